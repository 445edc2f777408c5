"""A training run from its config to its report: the only place that knows all parts.

How a run starts, by what its folder holds:

1. nothing: parameters are initialised from the seed, or come from ``config.init_from``; data starts at position 0;
2. the same run, unfinished: state and data position come from the newest checkpoint that can be read;
3. the same run, finished: only the evaluation and the report are made again;
4. another run: it is refused before anything is written.
"""

import hashlib
import json
import logging
import math
import os
import signal
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from clip_jax.config import check_same_run, to_json
from clip_jax.data.bad_samples import REASONS, BadSample, BadSamples, TooManyBadSamplesError
from clip_jax.data.decoded_cache import DecodedCache
from clip_jax.data.images import Augmentation, ImageError
from clip_jax.data.pipeline import TRANSFORM_VERSION, Batches, InputError, LoadPair, Transform
from clip_jax.data.sources import Mixture, PairError, open_mixture
from clip_jax.data.sources.buckets import Access, use_access
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.measuring import Extras
from clip_jax.evaluation.provenance import provenance
from clip_jax.evaluation.registry import find_tasks
from clip_jax.evaluation.report import write_report
from clip_jax.evaluation.results import Results, write_results
from clip_jax.evaluation.tasks import Evaluations
from clip_jax.evaluation.zero_shot import classifier_of
from clip_jax.losses import starting_parameters
from clip_jax.models.presets import model_preset
from clip_jax.run_folder import CheckpointError, absolute, read_config, saved_fingerprint, write_config
from clip_jax.sharding import check_batch_divides, to_global_batch
from clip_jax.training.checkpoint import Checkpointer
from clip_jax.training.metrics import MetricWriter, StepLog, format_duration, read_metrics, training_seconds
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import (
    TrainState,
    abstract_state,
    configured_mesh,
    create_state,
    make_model,
    state_from_variables,
)
from clip_jax.training.step import TrainStep, make_train_step
from clip_jax.weights import digest_of, read_weights
from clip_jax.weights.resizing import at_image_size

logger = logging.getLogger("clip_jax")


class Run(NamedTuple):
    """A run that has passed every check and has written nothing yet."""

    config: ml_collections.ConfigDict
    workdir: epath.Path
    mixture: Mixture
    evaluations: Evaluations
    mesh: Mesh
    steps: int
    data_fingerprint: str
    arguments: tuple[str, ...]


def prepare(config: ml_collections.ConfigDict, workdir: str, arguments: Sequence[str] = ()) -> Run:
    """Checks the folder, the data and whether the devices can share the batch; writes nothing.

    ``config`` has passed :func:`clip_jax.config.validate`; ``arguments`` of the command are for the report.

    Raises:
      ValueError, OSError: a mistake of the user's; the message says what, where and the mend.
    """
    folder = check_workdir(workdir)
    saved = read_config(folder)
    if saved is not None:
        check_same_run(config, saved, workdir)
    mesh = configured_mesh(config)
    check_batch_divides(config.global_batch_size, mesh, config.accumulation_steps)
    use_access(data_access(config))
    mixture = open_mixture(config.data.source, config.data.weights)
    check_first_pairs(mixture, data_transform(config, config.model.vision.image_size))
    steps = config.steps or math.ceil(config.epochs * len(mixture) / config.global_batch_size)
    if (smaller := config.progressive_resolution.steps) >= steps:
        raise ValueError(
            f"config.progressive_resolution.steps={smaller} must be below the run's {steps} steps, or it never sees "
            "pictures of the model's size"
        )
    fingerprint = f"{mixture.fingerprint()}-{len(mixture)}-seed{config.seed}-transform{TRANSFORM_VERSION}"
    before = saved_fingerprint(folder)
    if before is not None and saved is None:
        raise ValueError(f"{workdir} holds checkpoints but no config.json; restore it, or choose another --workdir")
    if before not in (None, fingerprint):
        raise ValueError(f"{workdir} was trained on other data than config.data.source={config.data.source} now holds")
    evaluations = open_evaluations(config)
    start = digest_of(read_initial_variables(config)) if config.init_from and before is None else ""
    check_hosts_agree(f"{fingerprint} {steps} {start} {dict(mesh.shape)} {to_json(config)}")
    return Run(config, folder, mixture, evaluations, mesh, steps, fingerprint, tuple(arguments))


def open_evaluations(config: ml_collections.ConfigDict) -> Evaluations:
    """The tasks of ``config.evaluation``.

    Raises:
      ValueError, OSError: there is no such task, or its data is not there or broken.
    """
    names, preset = config.evaluation.tasks, model_preset(config)
    evaluations = Evaluations(
        find_tasks(names) if names else [], preset.vision.image_size, config.evaluation.data, preset.preprocessing
    )
    for task in (*evaluations.missing, *evaluations.broken):
        how = f"; get it: {task.how_to_get}" if task.how_to_get else ""
        raise ValueError(f"config.evaluation.tasks={names}: {task.name}: {task.reason}{how}")
    return evaluations


def read_initial_variables(config: ml_collections.ConfigDict) -> dict:
    """What ``config.init_from`` holds, as ``params`` and ``batch_stats`` for the model of the config.

    Parameters of a loss are kept only if ``config.loss`` has the same (:func:`clip_jax.losses.starting_parameters`).

    Raises:
      FileNotFoundError, ValueError: there is no model, or one that differs in more than the image size.
    """
    try:
        here = model_preset(config)
        weights = read_weights(
            config.init_from, assumed_activation=here.text.activation, assumed_preprocessing=here.preprocessing
        )
        variables = at_image_size(weights.variables, weights.preset, here)
    except (ValueError, OSError, CheckpointError) as error:
        raise ValueError(f"config.init_from={config.init_from}: {error}") from None
    return variables | {"params": starting_parameters(variables["params"], config.loss)}


def check_workdir(workdir: str) -> epath.Path:
    """Raises ValueError unless the folder is there, or can be made, and can be written to."""
    if not workdir or "://" in workdir:
        raise ValueError(f"--workdir={workdir} must be a folder on a disk that all hosts share; mount a bucket first")
    folder = absolute(workdir)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--workdir={workdir}: {existing} is not a folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"--workdir={workdir}: {existing} cannot be written to")
    return folder


def check_first_pairs(mixture: Mixture, transform: Transform) -> None:
    """Raises ValueError if a source's first pair cannot be used: the source is not what it seemed to be."""
    for name, source in zip(mixture.names, mixture.sources, strict=True):
        try:
            pair = source[0]
        except PairError as error:
            raise ValueError(f"config.data.source={name}: {error}") from None
        try:
            transform.check(pair)
        except ImageError as error:
            raise ValueError(f"config.data.source={name}: its first picture, {pair.key}: {error}") from None


def data_access(config: ml_collections.ConfigDict) -> Access:
    """How the config wants buckets read."""
    data = config.data
    return Access(data.bucket_timeout, data.bucket_retries, data.bucket_connections)


def data_transform(config: ml_collections.ConfigDict, image_size: int) -> Transform:
    """What the config wants done with each pair."""
    data, preset = config.data, model_preset(config)
    return Transform(
        image_size,
        preset.text.context_length,
        Augmentation(**data.augmentation),
        data.min_image_side,
        data.max_aspect_ratio,
        preset.preprocessing.at_image_size(preset.vision.image_size, image_size),
    )


def check_hosts_agree(what: str) -> None:
    """Raises ValueError if hosts were started with different configs or see different data.

    All hosts meet here, so none begins to write while another still looks at what the folder holds.
    """
    digest = np.frombuffer(hashlib.sha256(what.encode()).digest(), np.uint8)
    if not np.all(multihost_utils.process_allgather(digest).reshape(-1, len(digest)) == digest):
        raise ValueError(
            "the hosts differ in config, data, the weights to start from or a device's memory; all need the same flags "
            "and the same files, and with unlike devices --config.mesh.fsdp"
        )


class Interruption:
    """Notes SIGINT and SIGTERM, so that the loop can save and leave between two steps; a second one ends at once."""

    def __init__(self):
        self.requested = False
        self._previous = {}

    def __enter__(self) -> "Interruption":
        if jax.process_count() == 1:
            handlers = {signal.SIGINT: self._note, signal.SIGTERM: self._note}
        else:
            # All hosts must stop at the same step. SIGTERM is left to JAX, which tells the others; Ctrl-C joins it.
            handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)


def train(run: Run) -> bool:
    """Trains to the last step, then evaluates and reports; True if the run is finished, False if interrupted."""
    config, mesh = run.config, run.mesh
    model, optimizer = make_model(config, mesh), make_optimizer(config.optimizer, run.steps)
    write_config(run.workdir, to_json(config))
    checkpointer = Checkpointer(run.workdir, config.checkpoints_to_keep)
    writer = MetricWriter(run.workdir)
    try:
        restored = checkpointer.restore_latest(abstract_state(model, optimizer, mesh))
        if restored:
            state, position = restored.state, restored.position
            logger.info("resumed at step %d of %d", int(state.step), run.steps)
        elif config.init_from:
            # Read again rather than kept since the checks: it is as large as the model, on every host.
            state, position = state_from_variables(read_initial_variables(config), model, optimizer, mesh), 0
            logger.info("starts from %s", config.init_from)
        else:
            state, position = create_state(model, optimizer, config.seed, mesh), 0
        _log_start(run, state)
        # Evaluation runs now and then, with many lengths of text: it is compiled as small as it can be.
        small = model.clone(scan_unroll=max(1, config.model.scan_unroll))
        embedder = Embedder(small, mesh, config.evaluation.batch_size)
        train_step = make_train_step(config, model, optimizer, mesh)
        with Interruption() as interruption:
            state = train_steps(run, train_step, state, position, checkpointer, writer, embedder, interruption)
            checkpointer.wait()
        step = int(state.step)
        if step < run.steps:
            logger.info(
                "stopped at step %d of %d, which is saved; the same command goes on from there", step, run.steps
            )
            return False
        started = time.monotonic()
        results = evaluate(run, embedder, state, writer, final=True)
        if jax.process_index() == 0:
            report_run(run, results, time.monotonic() - started)
        _log_end(run, results)
        return True
    finally:
        checkpointer.close()
        writer.close()


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


def train_steps(
    run: Run,
    train_step: TrainStep,
    state: TrainState,
    position: int,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    embedder: Embedder,
    interruption: Interruption,
) -> TrainState:
    """Steps until the last one or an interruption; the state that it returns is saved, or being saved.

    Raises:
      FloatingPointError: the loss or the gradient is no longer finite.
      InputError, TooManyBadSamplesError, OSError: the data cannot be used or read, or the folder of the run not
        be written to; what was trained until then is saved where that is possible.
    """
    config, first = run.config, run.config.progressive_resolution
    step, stopping = int(state.step), False
    before = training_seconds(read_metrics(run.workdir), step) if step and jax.process_index() == 0 else 0
    log = StepLog(config.log_every, config.global_batch_size, run.steps, writer, before)
    saved = step
    bad_samples = BadSamples(run.workdir / f"bad_samples{f'-{jax.process_index()}' * (jax.process_index() > 0)}.jsonl")
    image_size = first.image_size if step < first.steps else config.model.vision.image_size
    batches = make_batches(run, position, image_size)
    try:
        while step < run.steps and not stopping:
            if image_size != config.model.vision.image_size and step == first.steps:
                image_size = config.model.vision.image_size
                batches.close()
                batches = make_batches(run, position, image_size)
            with log.waiting_for_data():
                batch = next(batches)
            reasons = batch.pop("bad_reason")
            bad_samples.count(reasons)
            list_bad_samples(run, bad_samples, batch.pop("bad"), reasons)
            if not config.model.patch_dropout:
                batch.pop("seed")  # nothing is drawn in the step
            if len(run.mixture.sources) == 1:
                batch.pop("source")  # its loss is the loss
            batch = to_global_batch(batch, run.mesh)
            state, metrics = train_step(state, batch)
            step, position = step + 1, batches.position
            log.add(step, metrics, input_scalars(run, bad_samples, position) if log.is_due(step) else {})

            alone = jax.process_count() == 1
            stopping = interruption.requested if alone else checkpointer.preempted(step)
            if stopping or step == run.steps or step % config.checkpoint_every == 0:
                log.check_finite(step, metrics)
                checkpointer.save(step, state, position, run.data_fingerprint)
                saved = step
            evaluation_is_due = run.evaluations and config.eval_every and step % config.eval_every == 0
            if evaluation_is_due and step < run.steps and not stopping:
                log.flush()
                results = evaluate(run, embedder, state, writer)
                logger.info("step %d  %s", step, results.line())
        log.flush()
    except (InputError, TooManyBadSamplesError, OSError) as error:
        if interruption.requested and isinstance(error, InputError):
            # The signal has reached the workers as well, and ended them before the loop came to look.
            if step > saved:
                log.flush()
                checkpointer.save(step, state, position, run.data_fingerprint)
            return state
        # Too many bad samples are found by all hosts at the same step; of the rest other hosts know nothing.
        if step > saved and (jax.process_count() == 1 or isinstance(error, TooManyBadSamplesError)):
            save_before_leaving(checkpointer, log, step, metrics, state, position, run.data_fingerprint)
        raise
    finally:
        batches.close()
    return state


def save_before_leaving(
    checkpointer: Checkpointer,
    log: StepLog,
    step: int,
    metrics: dict[str, jax.Array],
    state: TrainState,
    position: int,
    data_fingerprint: str,
) -> None:
    """Saves the last whole step when something else has failed, whose message must not be lost if this fails, too."""
    try:
        log.check_finite(step, metrics)
        checkpointer.save(step, state, position, data_fingerprint)
        checkpointer.wait()
        logger.warning("saved step %d before leaving", step)
    except (FloatingPointError, CheckpointError) as error:
        logger.warning("step %d could not be saved: %s", step, error)


def input_scalars(run: Run, bad_samples: BadSamples, position: int) -> dict[str, float]:
    """What the metrics say of the data: bad samples of all hosts since the start by reason, and epochs by source.

    Raises:
      TooManyBadSamplesError: on all hosts alike.
    """
    local = np.append(bad_samples.counts, bad_samples.seen)
    halves = np.stack(np.divmod(local, 2**30)).astype(np.int32)  # JAX would cut off what is above 32 bits
    high, low = multihost_utils.process_allgather(halves).reshape(-1, *halves.shape).astype(np.int64).sum(axis=0)
    *counts, seen = (high * 2**30 + low).tolist()
    bad_samples.check(counts, seen, run.config.data.max_bad_share)
    scalars = {"bad_samples": sum(counts)}
    scalars |= {f"bad_samples/{reason}": count for reason, count in zip(REASONS, counts, strict=True) if count}
    epochs = run.mixture.epochs(position)
    return scalars | {f"epochs/{name}" if len(epochs) > 1 else "epochs": value for name, value in epochs.items()}


def make_batches(run: Run, position: int, image_size: int) -> Batches:
    """This host's batches from the data position on."""
    config = run.config
    return Batches(
        LoadPair(run.mixture, data_transform(config, image_size), DecodedCache(config.data.cache_mebibytes)),
        config.global_batch_size,
        config.seed,
        jax.process_index(),
        jax.process_count(),
        config.data.num_workers,
        config.data.num_threads,
        position,
    )


def list_bad_samples(run: Run, bad_samples: BadSamples, bad: np.ndarray, reasons: np.ndarray) -> None:
    """Names those of this batch that are not yet listed.

    Args:
      bad: int64 ``[B]``, the samples' indices, -1 where all was well.
      reasons: int8 ``[B]``, their places in ``REASONS``.
    """
    transform = data_transform(run.config, run.config.model.vision.image_size)
    found = []
    for index, reason in zip(bad[bad >= 0].tolist(), reasons[bad >= 0].tolist(), strict=True):
        if not bad_samples.is_new(index):
            continue
        name, message = f"record {index}", "it could be read when looked at again"
        try:
            pair = run.mixture[index]
            name = pair.key
            transform.check(pair)
        except Exception as error:  # as many kinds as made the pipeline replace it
            message = " ".join(str(error).split()) or type(error).__name__
        found.append(BadSample(index, REASONS[reason], name, message))
        logger.warning("replaced a bad sample by the next one: %s: %s", name, message)
    if found:
        bad_samples.add_to_list(found)


def evaluate(run: Run, embedder: Embedder, state: TrainState, writer: MetricWriter, final: bool = False) -> Results:
    """Scores the state, and writes ``eval/<step>.json`` and the metrics; ``final`` adds the baseline."""
    step = int(state.step)
    embedder = embedder.with_variables(state.variables)
    extras = Extras(baseline=final)
    results = run.evaluations.score(embedder, classifier_of(embedder), str(run.workdir), run.config.model.name, extras)
    for task in results.missing:  # no reason to end a training
        logger.warning("step %d  %s was not scored: %s", step, task.name, task.reason)
    if run.evaluations:
        writer.write(step, results.scalars())
    if run.evaluations and jax.process_index() == 0:
        folder = run.workdir / "eval"
        folder.mkdir(exist_ok=True)
        (folder / f"{step}.json").write_text(json.dumps(results.as_dict(), indent=2) + "\n")
    return results


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
    logger.info('Use it:  python -m clip_jax.predict --model=%s --labels="a dog,a cat" picture.png', run.workdir)
