"""Goes back to an earlier step of a run: moves what later steps have written to a folder of its own."""

import json

import jax
from etils import epath

from clip_jax.evaluation.images import all_gather_objects
from clip_jax.files import write_atomically
from clip_jax.json_lines import read_objects
from clip_jax.training.checkpoint import Checkpointer

FOLDER = "superseded"


def go_back(workdir: epath.Path, step: int, checkpointer: Checkpointer) -> epath.Path:
    """Moves checkpoints, metrics and evaluations of later steps to ``superseded/from_step_<step>``; all hosts call it.

    Returns:
      The folder, with a number added to its name if the run has gone back to this step before.
    """
    folder = workdir / FOLDER / all_gather_objects(_new_name(workdir, step))[0]
    checkpointer.set_aside_after(step, folder)
    if jax.process_index() == 0:
        _set_aside_metrics(workdir, step, folder)
        _set_aside_evaluations(workdir, step, folder)
    return folder


def _new_name(workdir: epath.Path, step: int) -> str:
    name, number = f"from_step_{step}", 2
    while (workdir / FOLDER / name).exists():
        name, number = f"from_step_{step}_{number}", number + 1
    return name


def _set_aside_metrics(workdir: epath.Path, step: int, folder: epath.Path) -> None:
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return
    content = path.read_bytes()
    records = [record for record in read_objects(content) if record is not None]
    kept = [record for record in records if isinstance(record.get("step"), int) and record["step"] <= step]
    if len(kept) < len(records):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / path.name, content)
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


def _set_aside_evaluations(workdir: epath.Path, step: int, folder: epath.Path) -> None:
    for path in (workdir / "eval").glob("*.json"):
        if path.stem.isdecimal() and int(path.stem) > step:
            (folder / "eval").mkdir(parents=True, exist_ok=True)
            path.rename(folder / "eval" / path.name)
