"""The training loop: batches, steps, checkpoints, evaluation, and the report at the end.

The start of a run depends on the contents of its folder:

1. nothing: parameters are initialized from the seed or from ``config.init_from``; data starts at position 0;
2. the same run, unfinished: state and data position come from the newest checkpoint that can be read;
3. the same run, finished: only the evaluation and the report are repeated;
4. another run: :mod:`clip_jax.training.preparation` raises an error before anything is written.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import time
from typing import NamedTuple

import jax
import ml_collections
import optax
from jax.experimental import multihost_utils

from clip_jax.config import to_json
from clip_jax.data.bad_samples import TooManyBadSamplesError
from clip_jax.data.pipeline import InputError
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.images import all_gather_objects
from clip_jax.evaluation.measuring import Extras
from clip_jax.evaluation.provenance import provenance
from clip_jax.evaluation.report import write_report
from clip_jax.evaluation.results import Results, write_results
from clip_jax.evaluation.sample_grid import draw_samples
from clip_jax.evaluation.zero_shot import classifier_of
from clip_jax.files import write_atomically
from clip_jax.history import active, continued, position_after, write_history
from clip_jax.models.clip import CLIP
from clip_jax.run_folder import CheckpointError, write_config
from clip_jax.settings import read_section
from clip_jax.sharding import to_global_batch
from clip_jax.training.checkpoint import Checkpointer
from clip_jax.training.feed import Feed
from clip_jax.training.going_back import go_back
from clip_jax.training.interruption import Interruption
from clip_jax.training.memory import memory_bytes
from clip_jax.training.metrics import MetricWriter, StepLog, format_duration, read_metrics, training_seconds
from clip_jax.training.optimizer import learning_rate_schedule, learning_rates, make_optimizer
from clip_jax.training.preparation import Run, read_initial_variables
from clip_jax.training.profiling import Profiler
from clip_jax.training.stall import StallWatch
from clip_jax.training.state import TrainState, abstract_state, create_state, make_model, state_from_variables
from clip_jax.training.step import TrainStep, make_train_step
from clip_jax.training.wandb_log import LoggingSettings, WandbLog

logger = logging.getLogger("clip_jax")


class Progress(NamedTuple):
    """The progress of a training: finished steps, the state after them, and examples that all hosts have drawn."""

    step: int
    state: TrainState
    position: int


class _InterruptedError(Exception):
    """A signal has ended an evaluation between two batches, on all hosts between the same two."""


def train(run: Run, interruption: Interruption, profile: tuple[int, int] | None = None) -> bool:
    """Trains to the last step, evaluates and writes the report. Returns True if finished, False if interrupted.

    Args:
      run: from :func:`clip_jax.training.preparation.prepare`.
      interruption: the request to stop.
      profile: the steps to trace, see :class:`clip_jax.training.profiling.Profiler`.

    Raises:
      FloatingPointError: the loss or the gradient is no longer finite.
      InputError, TooManyBadSamplesError, CheckpointError, OSError: the data cannot be used or read, or the folder of
        the run cannot be written to. The progress is saved if possible.
    """
    config = run.config
    model, optimizer = make_model(config, run.mesh), make_optimizer(config.optimizer, run.steps)
    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(contextlib.closing(open_checkpoints(run)))
        start = starting_point(run, model, optimizer, checkpointer)
        run = go_on(run, start.step, checkpointer)
        writer = stack.enter_context(contextlib.closing(MetricWriter(run.workdir, start.step, _wandb_log(run))))
        _log_start(run, start.state)
        stall = StallWatch(config.stall_minutes, checkpointer.is_saving, f"{run.workdir}/checkpoints")
        stack.enter_context(contextlib.closing(stall))
        saver = Saver(run, checkpointer, interruption, stall, start.step)
        evaluator = Evaluator(run, model, writer, saver)
        log = _step_log(run, start.step, writer)
        profiler = stack.enter_context(contextlib.closing(Profiler(profile, run.workdir / "profile", start.step)))
        train_step = _profiled(make_train_step(config, model, optimizer, run.mesh), profiler, start.step)
        try:
            end = train_steps(run, train_step, start, saver, log, evaluator)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; {_way_out(run, checkpointer.latest_step())}") from None
        stall.waits_for(f"the end of the save of step {end.step}")
        checkpointer.wait()
        started = time.monotonic()
        results = evaluator(end, final=True) if end.step == run.steps else None
        if results is None:
            logger.info("stopped at step %d of %d, which is saved; the same command resumes it", end.step, run.steps)
            return False
        stall.waits_for("the report")
        if jax.process_index() == 0:
            report_run(run, results, time.monotonic() - started)
        _log_end(run, results)
        return True


def _wandb_log(run: Run) -> WandbLog | None:
    settings = read_section(LoggingSettings, run.config.logging)
    if not settings.wandb_project or jax.process_index() > 0:
        return None
    return WandbLog(settings, run.workdir, run.config.to_dict())


def _profiled(train_step: TrainStep, profiler: Profiler, step: int) -> TrainStep:
    """Returns the step with the profiler around it; ``step`` steps have been trained."""
    numbers = itertools.count(step)

    def step_and_trace(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        done = next(numbers)
        with profiler.step(done, state):
            result = train_step(state, batch)
        profiler.finish_step(done + 1, result)
        return result

    return step_and_trace


def _way_out(run: Run, saved: int | None) -> str:
    """Returns what to do after a loss that is not finite, if the newest checkpoint is of step ``saved``."""
    optimizer = run.config.optimizer
    rate = f"--config.optimizer.learning_rate={optimizer.learning_rate / 2:g}"
    clip = "" if optimizer.gradient_clip_norm else " or --config.optimizer.gradient_clip_norm=1"
    if saved is None:
        return f"start again in another --workdir with {rate}{clip}"
    allowed = "optimizer.learning_rate" + (",optimizer.gradient_clip_norm" if clip else "")
    return f"go on from step {saved} with --from-step={saved} --allow-changed={allowed} and {rate}{clip}"


def open_checkpoints(run: Run) -> Checkpointer:
    """Returns the checkpoints of a run, each of which must have the data position of its step."""
    config, segments = run.config, active(run.history) or [run.settings]
    return Checkpointer(
        run.workdir, config.checkpoints_to_keep, functools.partial(position_after, segments), config.keep_every
    )


def starting_point(
    run: Run, model: CLIP, optimizer: optax.GradientTransformation, checkpointer: Checkpointer
) -> Progress:
    """Returns the newest checkpoint that can be read, the model of ``config.init_from``, or new parameters.

    Raises:
      CheckpointError: there are checkpoints, but none can be read.
      ValueError: ``config.init_from`` has no parameters for this model.
    """
    config = run.config
    template, from_step = abstract_state(model, optimizer, run.mesh), run.settings.from_step
    if from_step is None:
        restored = checkpointer.restore_latest(template)
    else:
        restored = checkpointer.restore_step(from_step, template)
    if restored:
        step = int(restored.state.step)
        logger.info("resumed at step %d of %d", step, run.steps)
        return Progress(step, restored.state, restored.position)
    if config.init_from:
        # The checks have read it, too, but did not keep it: it is as large as the model.
        state = state_from_variables(read_initial_variables(config), model, optimizer, run.mesh)
        logger.info("starts from %s", config.init_from)
    else:
        state = create_state(model, optimizer, config.seed, run.mesh)
    return Progress(0, state, 0)


def go_on(run: Run, step: int, checkpointer: Checkpointer) -> Run:
    """Writes the config and the history of a run that goes on after ``step`` steps, and returns it with that history.

    With ``--from-step``, what later steps have written is moved aside first. A kill in between leaves a run that goes
    on from the same step by the same command.
    """
    settings = run.settings
    if settings.from_step is not None:
        folder = go_back(run.workdir, step, checkpointer)
        logger.info("went back to step %d; what later steps wrote is in %s", step, folder)
    history = continued(run.history, settings, step)
    for key, (before, now) in settings.changed.items():
        logger.info("config.%s was %s and is %s from step %d on", key, before, now, step)
    if settings.changed and run.previous:
        _log_learning_rates(run, step)
    if jax.process_index() == 0:
        run.workdir.mkdir(parents=True, exist_ok=True)
        write_history(run.workdir, history)
    write_config(run.workdir, to_json(run.config))
    return run._replace(history=tuple(history))


def _log_learning_rates(run: Run, step: int) -> None:
    """Logs the learning rate of the next step before and after the change of the settings, if they differ."""
    before = learning_rate_schedule(ml_collections.ConfigDict(run.previous["optimizer"]), run.history[-1].steps)
    now = learning_rate_schedule(run.config.optimizer, run.steps)
    if (rates := (float(before(step)), float(now(step))))[0] != rates[1]:
        logger.info("the learning rate of step %d is %.3g instead of %.3g", step + 1, rates[1], rates[0])


def train_steps(
    run: Run, train_step: TrainStep, progress: Progress, saver: "Saver", log: StepLog, evaluator: "Evaluator"
) -> Progress:
    """Trains to the last step or to a request to stop. Returns the progress, of which a save has been started.

    Raises:
      FloatingPointError, InputError, TooManyBadSamplesError, OSError: as :func:`train`.
    """
    metrics: dict[str, jax.Array] = {}
    stopping = False
    feed, rates = Feed(run, progress.step), learning_rates(run.config.optimizer, run.steps)

    def scalars() -> dict[str, float]:
        return feed.scalars() | {"learning_rate": float(rates[progress.step - 1])} | memory_bytes()

    try:
        if evaluator.was_missed(progress.step):
            with log.during("evaluation"):
                stopping = evaluator(progress) is None
        while progress.step < run.steps and not stopping:
            saver.stall.waits_for(f"the data of step {progress.step + 1}")
            with log.during("input"):
                batch = feed.next(progress.step)
            saver.stall.waits_for(
                f"the devices, in step {progress.step} or {progress.step + 1}"
                if metrics
                else "its first step to compile"
            )
            state, metrics = train_step(progress.state, to_global_batch(batch.inputs, run.mesh))
            progress = Progress(progress.step + 1, state, feed.position)
            saver.interruption.defer()
            log.add(progress.step, metrics, scalars() if log.is_due(progress.step) else {})
            stopping, evaluating = saver.must_stop(), evaluator.is_due(progress.step)
            if stopping or evaluating or saver.is_due(progress.step):
                with log.during("save"):
                    saver.save(progress, metrics)
            if evaluating and not stopping:
                log.flush()
                with log.during("evaluation"):
                    stopping = evaluator(progress) is None
        log.flush()
    except (InputError, TooManyBadSamplesError, OSError) as error:
        interrupted = isinstance(error, InputError) and saver.interruption.explains_lost_workers()
        if interrupted and saver.has_missed(progress):
            log.flush()
            saver.save(progress, metrics)
        if not interrupted:
            # A save needs all hosts. They raise TooManyBadSamplesError at the same step, but not other errors.
            can_save = jax.process_count() == 1 or isinstance(error, TooManyBadSamplesError)
            if can_save and saver.has_missed(progress):
                saver.save_before_leaving(progress, metrics)
            raise
    finally:
        feed.close()
    return progress


class Saver:
    """Saves the progress of a training, and decides when to save and when to stop."""

    def __init__(self, run: Run, checkpointer: Checkpointer, interruption: Interruption, stall: StallWatch, step: int):
        """``step`` is the last saved step."""
        self.interruption, self.stall = interruption, stall
        self._run, self._checkpointer, self._saved = run, checkpointer, step
        self._saved_at = time.monotonic()
        self._questions = 0

    def must_stop(self) -> bool:
        """Returns whether a signal requested a stop. All hosts ask as often, and get the same results."""
        if jax.process_count() == 1:
            return self.interruption.requested
        self._questions += 1  # and not the step: JAX needs a number that grows by one each time
        return multihost_utils.reached_preemption_sync_point(self._questions)

    def is_due(self, step: int) -> bool:
        """Returns whether this step must be saved. All hosts ask, and get the same results."""
        config = self._run.config
        if step == self._run.steps or step % config.checkpoint_every == 0:
            return True
        if not config.checkpoint_minutes or step % config.log_every:
            return False
        return all_gather_objects(time.monotonic() - self._saved_at >= 60 * config.checkpoint_minutes)[0]

    def has_missed(self, progress: Progress) -> bool:
        """Returns whether there are steps since the last save."""
        return progress.step > self._saved

    def save(self, progress: Progress, metrics: dict[str, jax.Array]) -> None:
        """Starts a save.

        Raises:
          FloatingPointError: the loss or the gradient is not finite.
          CheckpointError: the folder cannot be written to, or the previous save has failed.
        """
        StepLog.check_finite(progress.step, metrics)
        self.stall.waits_for(f"the start of the save of step {progress.step}, after the one before")
        self._checkpointer.save(progress.step, progress.state, progress.position, self._run.data_fingerprint)
        self._saved, self._saved_at = progress.step, time.monotonic()

    def save_before_leaving(self, progress: Progress, metrics: dict[str, jax.Array]) -> None:
        """Saves after another error. If this fails, it logs a warning and raises nothing, to keep the first error."""
        try:
            self.save(progress, metrics)
            self._checkpointer.wait()
            logger.warning("saved step %d before leaving", progress.step)
        except (FloatingPointError, CheckpointError) as error:
            logger.warning("step %d could not be saved: %s", progress.step, error)


class Evaluator:
    """Evaluates the state on the tasks of ``config.evaluation``."""

    def __init__(self, run: Run, model: CLIP, writer: MetricWriter, saver: Saver):
        self._run, self._writer, self._saver = run, writer, saver
        # Evaluation is rare and compiles a program for each length of texts, so compile time matters more than speed.
        execution = dataclasses.replace(model.execution, scan_unroll=max(1, run.config.model.scan_unroll))
        self._embedder = Embedder(
            model.clone(execution=execution), run.mesh, run.config.evaluation.batch_size, self._before_batch
        )

    def is_due(self, step: int) -> bool:
        """Returns whether to evaluate after this step. The evaluation after the last step is separate."""
        every = self._run.config.eval_every
        return bool(self._run.evaluations and every) and step % every == 0 and step < self._run.steps

    def was_missed(self, step: int) -> bool:
        """Returns whether this step was saved, but not evaluated before the process was ended. All hosts call it."""
        done = (self._run.workdir / "eval" / f"{step}.json").exists()
        return step > 0 and self.is_due(step) and not all_gather_objects(done)[0]

    def __call__(self, progress: Progress, final: bool = False) -> Results | None:
        """Evaluates the state, and writes ``eval/<step>.json`` and the metrics; ``final`` adds the baseline.

        Returns None, and writes nothing, if a signal has ended it between two batches.
        """
        run, step = self._run, progress.step
        self._waits_for = f"a batch of the evaluation of step {step}"
        embedder = self._embedder.set_variables(progress.state.variables)
        extras = Extras(baseline=final)
        try:
            results = run.evaluations.score(
                embedder, classifier_of(embedder), str(run.workdir), run.config.model.name, extras
            )
        except _InterruptedError:
            return None
        for task in results.missing:  # not worth ending a training for
            logger.warning("step %d  %s was not scored: %s", step, task.name, task.reason)
        if run.evaluations:
            self._writer.write(step, results.scalars())
            if jax.process_index() == 0:
                self._write_samples(step, results)
                folder = run.workdir / "eval"
                folder.mkdir(exist_ok=True)
                write_atomically(folder / f"{step}.json", json.dumps(results.as_dict(), indent=2) + "\n")
            if not final:
                logger.info("step %d  %s", step, results.line())
        return results

    def _write_samples(self, step: int, results: Results) -> None:
        for task in results.tasks:
            if (grid := draw_samples(task)) is not None:
                self._writer.write_image(step, f"{task.name}/samples", grid)

    def _before_batch(self) -> None:
        self._saver.stall.waits_for(self._waits_for)
        if self._saver.must_stop():
            raise _InterruptedError


def report_run(run: Run, results: Results, evaluation_seconds: float) -> None:
    """Writes the results and the report of a finished run."""
    history = read_metrics(run.workdir)
    seconds = training_seconds(history, run.steps)
    made = provenance(
        "clip_jax.main",
        run.arguments,
        steps=f"{run.steps:,}",
        training_time=format_duration(seconds) if seconds else "",
        evaluation_time=f"{evaluation_seconds:.1f}s" if results.tasks else "",
        config=to_json(run.config),
    )
    write_results(run.workdir / "report", results)
    write_report(run.workdir / "report", results, history, provenance=made)


def _step_log(run: Run, step: int, writer: MetricWriter) -> StepLog:
    seconds = training_seconds(read_metrics(run.workdir), step) if step and jax.process_index() == 0 else 0
    return StepLog(run.config.log_every, run.config.global_batch_size, run.steps, writer, seconds)


def _log_start(run: Run, state: TrainState) -> None:
    config = run.config
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    data, fsdp = run.mesh.devices.shape
    logger.info(
        "%s, %s parameters; %s pairs, batch %s, %s steps (%.1f epochs); %d %s devices, data %d x fsdp %d",
        config.model.name,
        f"{parameters:,}",
        f"{len(run.mixture):,}",
        f"{config.global_batch_size:,}",
        f"{run.steps:,}",
        run.steps * config.global_batch_size / len(run.mixture),
        jax.device_count(),
        jax.default_backend(),
        data,
        fsdp,
    )
    for note in run.mixture.notes():
        logger.info("%s", note)


def _log_end(run: Run, results: Results) -> None:
    if run.evaluations:
        logger.info("%s", results.table())
    logger.info("finished %d steps. In %s:", run.steps, run.workdir)
    logger.info("  checkpoints/%d  metrics.jsonl  tensorboard/  config.json", run.steps)
    if run.evaluations:
        logger.info("  eval/%d.json", run.steps)
    logger.info("  report/report.html (open it in a browser)")
    logger.info('Use it:  python -m clip_jax.predict --model=%s --labels="a dog,a cat" image.png', run.workdir)
