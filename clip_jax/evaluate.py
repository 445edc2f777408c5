"""Scores a model on tasks: zero-shot classification, retrieval, linear probes, robustness to shift.

    python -m clip_jax.evaluate --model=runs/quickstart --tasks=ships --output=evaluations/quickstart
    python -m clip_jax.evaluate --list
    python -m clip_jax.evaluate --compare evaluations/one evaluations/other --output=evaluations/both

On a pod, run the same command on every host. Exit codes: 0 done, 2 a mistake in what was asked for or nothing that
could be scored (one line each), 3 interrupted.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
import time

from etils import epath

from clip_jax.command_line import RaisingParser
from clip_jax.evaluation.results import MissingTask
from clip_jax.models.activations import ACTIVATIONS
from clip_jax.standard_output import run


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Raises ValueError if the flags do not go together; one line."""
    parser = RaisingParser(prog="python -m clip_jax.evaluate", description="Scores a model on tasks.")
    parser.add_argument(
        "--model", type=os.path.expanduser, help="a run, or weights of OpenAI, open_clip or Hugging Face"
    )
    parser.add_argument("--tasks", default="", help="tasks, groups or files of tasks, separated by commas; see --list")
    parser.add_argument("--output", type=_path, help="a folder for results.json and report.html")
    parser.add_argument("--data", default="~/data", help="the folder of data sets (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print all tasks, which are missing and how to get them")
    parser.add_argument("--compare", nargs="+", type=_path, metavar="FOLDER", help="outputs to set side by side")
    parser.add_argument("--synthetic-shift", action="store_true", help="blur, noise, JPEG and brightness as well")
    parser.add_argument(
        "--linear-probe", action="store_true", help="and logistic regression, where there is a train split"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images or texts at once, on all devices")
    parser.add_argument("--dtype", default="float32", help="of the computation: float32 or bfloat16")
    parser.add_argument("--activation", choices=ACTIVATIONS, help="of a file that cannot tell; else quick_gelu")
    parser.add_argument("--distributed", action="store_true", help="join the other hosts of a pod (Cloud TPU VMs only)")
    arguments = parser.parse_args(argv)
    arguments.given = argv
    wanted = [name for name in ("list", "compare", "model") if getattr(arguments, name)]
    if len(wanted) != 1:
        raise ValueError("give one of --model, --list and --compare")
    if arguments.model and not arguments.tasks:
        raise ValueError("--tasks names nothing to score; --list shows what there is")
    return arguments


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        run = _list if arguments.list else _compare if arguments.compare else _evaluate
        return run(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {str(error) or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 3


def _path(text: str) -> epath.Path:
    return epath.Path(text).expanduser()  # a shell leaves the ~ of --output=~/folder alone


def _list(arguments: argparse.Namespace) -> int:
    from clip_jax.data.sources import MissingPackageError, open_source
    from clip_jax.evaluation.registry import ALL, find_tasks

    for task in find_tasks(arguments.tasks or ALL):
        try:
            count = len(open_source(task.source.replace("{data}", os.path.expanduser(arguments.data))))
            state = f"there, {count:,} pictures"
        except (FileNotFoundError, MissingPackageError) as error:
            state = f"missing: {error}"
            if task.how_to_get:
                state += f"\n{'':26}get it: {task.how_to_get.replace('{data}', arguments.data)}"
        except ValueError as error:
            state = f"broken: {error}"
        print(f"{task.name:25} {task.kind:10} {task.metric:24} {','.join(task.groups)}\n{'':26}{state}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from clip_jax.evaluation.comparison import compare, write_comparison

    comparison = compare(arguments.compare)
    print(comparison.table())
    if arguments.output:
        write_comparison(arguments.output, comparison)
        print(f"\nin {arguments.output}/comparison.html")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from clip_jax.evaluation.registry import find_tasks

    tasks = find_tasks(arguments.tasks)
    from clip_jax.main import start_distributed

    start_distributed(arguments.distributed)
    import jax

    from clip_jax.cache import cache_folder
    from clip_jax.evaluation.measuring import Extras
    from clip_jax.evaluation.provenance import provenance
    from clip_jax.evaluation.remembered import remembering
    from clip_jax.evaluation.report import write_report
    from clip_jax.evaluation.results import Results, main_metric, write_results
    from clip_jax.evaluation.tasks import Evaluations
    from clip_jax.evaluation.zero_shot import classifier_of
    from clip_jax.loading import load
    from clip_jax.run_folder import CheckpointError

    logging.getLogger("clip_jax").setLevel(logging.WARNING)
    first_host = jax.process_index() == 0
    output = _writable(arguments.output) if arguments.output and first_host else None
    try:
        model = load(arguments.model, arguments.batch_size, arguments.dtype, arguments.activation)
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    preset = model.preset
    evaluations = Evaluations(tasks, preset.vision.image_size, arguments.data, preset.preprocessing)
    if first_host:
        for task in evaluations.missing:
            print(f"missing: {_line(task)}", file=sys.stderr)
        for task in evaluations.broken:
            print(f"error: {_line(task)}", file=sys.stderr)
    if not evaluations:
        if evaluations.broken:
            return 2
        raise ValueError("none of these tasks has its data here")

    embedder = model.embedder
    classifier = remembering(
        classifier_of(embedder), f"{model.digest} {model.preset} {arguments.dtype}", cache_folder("classifiers")
    )
    started, told = time.monotonic(), len(evaluations.missing) + len(evaluations.broken)

    def tell(results: Results) -> None:
        nonlocal told
        if not first_host:
            return
        if len(results.missing) > told:
            told += 1
            print(f"error: {_line(results.missing[-1])}", file=sys.stderr, flush=True)
            return
        task = results.tasks[-1]
        print(f"{main_metric(task):68} after {time.monotonic() - started:,.0f} s", flush=True)
        if output:  # after each: what comes next may take hours
            write_results(output, results)

    extras = Extras(True, arguments.synthetic_shift, arguments.linear_probe)
    results = evaluations.score(embedder, classifier, str(arguments.model), model.name, extras, tell, again=False)
    if first_host and results.tasks:
        print(f"\n{results.table()}")
        if output:
            history, facts = _facts(arguments.model, dataclasses.asdict(model.preset))
            facts["evaluation_time"] = f"{time.monotonic() - started:,.1f}s"
            write_results(output, results)
            write_report(output, results, history, provenance=provenance("clip_jax.evaluate", arguments.given, **facts))
            print(f"\nin {output}: report.html (open it in a browser), results.json")
    return 2 if len(results.missing) > len(evaluations.missing) else 0


def _facts(model: str, description: dict) -> tuple[list[dict[str, float]], dict[str, str]]:
    """A run's metrics, steps, training time and config; of other weights no metrics, and the model's description."""
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
    """The folder, made if it is not there; raises OSError now rather than after hours if it cannot be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.write_text("")
    probe.unlink()
    return folder


if __name__ == "__main__":
    run(main)
