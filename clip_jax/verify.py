"""Checks the folder of a run: every checkpoint against its digests, the config and the metrics.

    python -m clip_jax.verify runs/quickstart

Prints a line for each checkpoint. Changes nothing, and needs no device. Exit codes: 0 all is whole, 1 something is
damaged or the command failed, 2 there is no run in this folder or a flag is wrong, 3 interrupted.
"""

import argparse
import os
from typing import TYPE_CHECKING

from clip_jax.command_line import DONE, FAILED, Parser, command, run, set_up_logging
from clip_jax.errors import FailedError

if TYPE_CHECKING:
    from etils import epath

PROGRAM = "python -m clip_jax.verify"


def parse_arguments(argv: list[str], program: str = PROGRAM) -> argparse.Namespace:
    """Returns the flags.

    Raises:
      ValueError: a flag is unknown, or the folder is missing.
    """
    parser = Parser(prog=program, description="Checks every checkpoint of a run, its config and its metrics.")
    parser.add_argument("run", type=os.path.expanduser, help="the folder of the run: the --workdir of a training")
    return parser.read(argv)


@command(PROGRAM)
def main(argv: list[str], program: str) -> int:
    folder = parse_arguments(argv, program).run
    os.environ["JAX_PLATFORMS"] = "cpu"  # a training may hold the devices
    from clip_jax.run_folder import absolute

    set_up_logging()
    workdir = absolute(folder)
    if not (workdir / "checkpoints").exists() and not (workdir / "config.json").exists():
        raise ValueError(f"{folder} holds no run: neither config.json nor checkpoints/")
    whole = [_report_config(workdir), _report_history(workdir), _report_metrics(workdir)]
    whole += [_report_checkpoint(workdir, step) for step in _steps(workdir)]
    return DONE if all(whole) else FAILED


def _steps(workdir: "epath.Path") -> list[int]:
    folder = workdir / "checkpoints"
    names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdecimal())


def _report_config(workdir: "epath.Path") -> bool:
    from clip_jax.run_folder import read_config

    try:
        problem = "missing" if read_config(workdir) is None else ""
    except ValueError:
        problem = "damaged: it is not a JSON object"
    print(f"config.json: {problem or 'whole'}")
    return not problem


def _report_history(workdir: "epath.Path") -> bool:
    from clip_jax.history import NAME, read_history

    try:
        segments = read_history(workdir)
    except FailedError as error:
        print(f"{NAME}: damaged: {error}")
        return False
    if segments:
        print(f"{NAME}: {len(segments)} {'line' if len(segments) == 1 else 'lines'}")
    return True


def _report_metrics(workdir: "epath.Path") -> bool:
    from clip_jax.json_lines import read_objects

    file = workdir / "metrics.jsonl"
    if file.exists():
        records = read_objects(file.read_bytes())
        cut = records.count(None)
        note = f", {cut} of them unreadable and ignored: a kill can cut a line" if cut else ""
        print(f"metrics.jsonl: {len(records)} lines{note}")
    return True


def _report_checkpoint(workdir: "epath.Path", step: int) -> bool:
    from clip_jax.run_folder import examine_checkpoint

    problems, is_verified = examine_checkpoint(workdir, step)
    state = "whole" if is_verified else "readable, but without digests: an earlier version saved it"
    print(f"checkpoints/{step}: {'damaged: ' + '; '.join(problems) if problems else state}", flush=True)
    return not problems


if __name__ == "__main__":
    run(main)
