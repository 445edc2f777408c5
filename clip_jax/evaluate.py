"""Scores a model on tasks: zero-shot classification, retrieval, linear probes and robustness to distribution shift.

    python -m clip_jax.evaluate --model=runs/quickstart --tasks=ships --output=evaluations/quickstart
    python -m clip_jax.evaluate --list
    python -m clip_jax.evaluate --compare evaluations/one evaluations/other --output=evaluations/both

On a pod, run the same command on every host. Exit codes: 0 all tasks with data are scored; 1 a failure, such as a full
disk; 2 a wrong argument, or a task that could not be scored, with one line each; 3 interrupted.
"""

import argparse
import dataclasses
import json
import os
import time
from typing import TYPE_CHECKING

from etils import epath

from clip_jax.command_line import (
    DONE,
    MISTAKE,
    Parser,
    command,
    report,
    run,
    set_up_logging,
    start_distributed,
)
from clip_jax.evaluation.results import MissingTask, Results, main_metric, write_results
from clip_jax.models.activations import ACTIVATIONS

if TYPE_CHECKING:
    from clip_jax.loading import LoadedModel

PROGRAM = "python -m clip_jax.evaluate"


def parse_arguments(argv: list[str], program: str = PROGRAM) -> argparse.Namespace:
    """Reads the flags. Raises ValueError if one is wrong, or if they cannot be combined; one line."""
    parser = Parser(prog=program, description="Scores a model on tasks.")
    parser.add_argument(
        "--model", type=os.path.expanduser, help="a run, or weights of OpenAI, open_clip or Hugging Face"
    )
    parser.add_argument("--tasks", default="", help="tasks, groups or files of tasks, separated by commas; see --list")
    parser.add_argument("--output", type=_path, help="a folder for results.json and report.html")
    parser.add_argument("--data", default="~/data", help="the folder of data sets (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print all tasks, and how to get data that is missing")
    parser.add_argument("--compare", nargs="+", type=_path, metavar="FOLDER", help="outputs to compare")
    parser.add_argument("--synthetic-shift", action="store_true", help="also use blur, noise, JPEG and brightness")
    parser.add_argument(
        "--linear-probe", action="store_true", help="also fit logistic regression, for tasks with a train split"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images or texts in a batch, over all devices")
    parser.add_argument("--dtype", default="float32", help="dtype of the computation: float32 or bfloat16")
    parser.add_argument("--activation", choices=ACTIVATIONS, help="if a file does not state it (default quick_gelu)")
    parser.add_distributed()
    arguments = parser.read(argv)
    arguments.given = argv
    wanted = [name for name in ("list", "compare", "model") if getattr(arguments, name)]
    if len(wanted) != 1:
        raise ValueError("give one of --model, --list and --compare")
    if arguments.model and not arguments.tasks:
        raise ValueError("--tasks names no task; --list shows all")
    return arguments


@command(PROGRAM)
def main(argv: list[str], program: str) -> int:
    arguments = parse_arguments(argv, program)
    if arguments.list:
        return _list(arguments)
    return _compare(arguments) if arguments.compare else _evaluate(arguments)


def _path(text: str) -> epath.Path:
    return epath.Path(text).expanduser()  # a shell does not expand the ~ in --output=~/folder


def _list(arguments: argparse.Namespace) -> int:
    from clip_jax.data.sources import MissingPackageError, open_source
    from clip_jax.evaluation.registry import ALL, find_tasks

    for task in find_tasks(arguments.tasks or ALL):
        try:
            count = len(open_source(task.source.replace("{data}", os.path.expanduser(arguments.data))))
            state = f"found, {count:,} images"
        except (FileNotFoundError, MissingPackageError) as error:
            state = f"missing: {error}"
            if task.how_to_get:
                state += f"\n{'':26}get it: {task.how_to_get.replace('{data}', arguments.data)}"
        except ValueError as error:
            state = f"invalid: {error}"
        print(f"{task.name:25} {task.kind:10} {task.metric:24} {','.join(task.groups)}\n{'':26}{state}")
    return DONE


def _compare(arguments: argparse.Namespace) -> int:
    from clip_jax.evaluation.comparison import compare, write_comparison

    comparison = compare(arguments.compare)
    print(comparison.table())
    if arguments.output:
        write_comparison(arguments.output, comparison)
        print(f"\nwrote {arguments.output}/comparison.html")
    return DONE


def _evaluate(arguments: argparse.Namespace) -> int:
    from clip_jax.evaluation.registry import find_tasks

    tasks = find_tasks(arguments.tasks)
    start_distributed(arguments.distributed, arguments.startup_timeout)
    import jax

    from clip_jax.cache import cache_folder
    from clip_jax.evaluation.cached import cached_classifier
    from clip_jax.evaluation.evaluations import Evaluations
    from clip_jax.evaluation.measuring import Extras
    from clip_jax.evaluation.provenance import provenance
    from clip_jax.evaluation.report import write_report
    from clip_jax.evaluation.zero_shot import classifier_of

    set_up_logging()
    first_host = jax.process_index() == 0
    output = _writable(arguments.output) if arguments.output and first_host else None
    model = _load(arguments)
    preset = model.preset
    evaluations = Evaluations(tasks, preset.vision.image_size, arguments.data, preset.preprocessing, False)
    if first_host:
        for task in evaluations.missing:
            report("missing", _line(task))
        for task in evaluations.broken:
            report("error", _line(task))
    if not evaluations:
        if evaluations.broken:
            return MISTAKE
        raise ValueError("no task has its data; --list shows how to get it")

    embedder = model.embedder
    classifier = cached_classifier(
        classifier_of(embedder), f"{model.digest} {model.preset} {arguments.dtype}", cache_folder("classifiers")
    )
    progress = _Progress(first_host, output, len(evaluations.missing) + len(evaluations.broken))
    extras = Extras(True, arguments.synthetic_shift, arguments.linear_probe)
    results = evaluations.score(embedder, classifier, str(arguments.model), model.name, extras, progress)
    if first_host and results.tasks:
        print(f"\n{results.table()}")
        if output:
            history, facts = _facts(arguments.model, dataclasses.asdict(model.preset))
            facts["evaluation_time"] = f"{progress.seconds():,.1f}s"
            write_results(output, results)
            write_report(output, results, history, provenance=provenance("clip_jax.evaluate", arguments.given, **facts))
            print(f"\nwrote {output}: report.html (open it in a browser), results.json")
    return MISTAKE if len(results.missing) > len(evaluations.missing) else DONE


def _load(arguments: argparse.Namespace) -> "LoadedModel":
    from clip_jax.loading import load
    from clip_jax.run_folder import CheckpointError

    try:
        return load(arguments.model, arguments.batch_size, arguments.dtype, arguments.activation)
    except CheckpointError as error:
        raise ValueError(str(error)) from None


class _Progress:
    """Prints each scored task or the reason why it is not, and writes the results so far; on the first host only."""

    def __init__(self, first_host: bool, output: epath.Path | None, reported: int):
        self._first_host, self._output, self._reported = first_host, output, reported
        self._started = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def __call__(self, results: Results) -> None:
        if not self._first_host:
            return
        if len(results.missing) > self._reported:
            self._reported += 1
            report("error", _line(results.missing[-1]))
            return
        print(f"{main_metric(results.tasks[-1]):68} after {self.seconds():,.0f} s", flush=True)
        if self._output:  # now, since the next task may take hours
            write_results(self._output, results)


def _facts(model: str, description: dict) -> tuple[list[dict[str, float]], dict[str, str]]:
    """Returns a run's metrics, and its steps, training time and config; for other weights the description only."""
    from clip_jax.run_folder import read_config
    from clip_jax.training.metrics import format_duration, read_metrics, training_seconds

    run = epath.Path(model)
    config = read_config(run) if (run / "checkpoints").exists() else None
    if config is None:
        return [], {"model": model, "config": json.dumps(description, indent=2)}
    facts = {"model": model, "config": json.dumps(config, indent=2)}
    steps = [int(entry.name) for entry in (run / "checkpoints").iterdir() if entry.name.isdecimal()]
    if steps:
        facts["steps"] = f"{max(steps):,}"
    history = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    seconds = training_seconds(history, max(steps, default=0))
    if seconds:
        facts["training_time"] = format_duration(seconds)
    return history, facts


def _line(task: MissingTask) -> str:
    return f"{task.name}: {task.reason}" + (f"; get it: {task.how_to_get}" if task.how_to_get else "")


def _writable(folder: epath.Path) -> epath.Path:
    """Creates the folder. Raises OSError if it is not writable, before the evaluation rather than after it."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.write_text("")
    probe.unlink()
    return folder


if __name__ == "__main__":
    run(main)
