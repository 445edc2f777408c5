"""Reads and writes the folder of a run without training: ``config.json``, the parameters, what the data was.

A checkpoint that cannot be read is skipped, with a warning, for the one before it.
"""

import json
import logging
import os
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from clip_jax.errors import FailedError, first_line
from clip_jax.files import write_whole

logger = logging.getLogger("clip_jax")


class CheckpointError(FailedError):
    """A run has checkpoints, and none of them can be read; or one cannot be written."""


def absolute(folder: str | os.PathLike) -> epath.Path:
    """The folder by its full path, ``~`` and symbolic links resolved; an address in a bucket is returned unchanged.

    orbax returns no metadata for a relative path, without an error.
    """
    if "://" in os.fspath(folder):
        return epath.Path(folder)
    # Not epath's resolve(): it takes the ".." of link/.. for the folder that holds the link.
    return epath.Path(pathlib.Path(folder).expanduser().resolve())


def saved_fingerprint(workdir: epath.Path) -> str | None:
    """The fingerprint of the data that the newest readable checkpoint was trained on, or None without one."""
    workdir = absolute(workdir)
    if not (workdir / "checkpoints").exists():
        return None
    with _read_only(workdir) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                restored = manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))
            except Exception:  # damaged: restoring will say so
                continue
            return restored.data["data_fingerprint"]
    return None


def _read_only(workdir: epath.Path) -> ocp.CheckpointManager:
    # Not read_only=True: orbax warns of that option itself and of each default that it overrides.
    return ocp.CheckpointManager(workdir / "checkpoints", options=ocp.CheckpointManagerOptions(create=False))


def restore_variables(workdir: epath.Path) -> dict:
    """``params`` and ``batch_stats`` as numpy arrays, of the newest checkpoint that can be read, for using the model.

    Raises:
      FileNotFoundError: the run has no checkpoint.
      CheckpointError: it has some, but none can be read.
    """
    workdir = absolute(workdir)
    if not (workdir / "checkpoints").exists():
        raise FileNotFoundError(f"{workdir} has no checkpoint")
    with _read_only(workdir) as manager:
        steps, directory = sorted(manager.all_steps(), reverse=True), manager.directory
    for step in steps:
        try:
            return _restore_as_numpy(directory / str(step) / "state")
        except Exception as error:
            logger.warning("checkpoint %d cannot be read and is skipped: %s", step, first_line(error))
    if steps:
        raise CheckpointError(f"none of the checkpoints in {directory} can be read: {steps}")
    raise FileNotFoundError(f"{workdir} has no checkpoint")


def _restore_as_numpy(state: epath.Path) -> dict:
    handler = ocp.PyTreeCheckpointHandler()
    saved = handler.metadata(state).tree  # a checkpointer's metadata() also looks for a step's file, and warns
    wanted = {name: saved.get(name) or {} for name in ("params", "batch_stats")}
    arguments = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted),
        partial_restore=True,
    )
    return {"batch_stats": {}} | ocp.Checkpointer(handler).restore(state, args=arguments)


def save_variables(workdir: epath.Path, variables: dict) -> None:
    """Writes ``params`` and ``batch_stats`` alone, as step 0, where :func:`restore_variables` finds them."""
    with ocp.CheckpointManager(absolute(workdir) / "checkpoints") as manager:
        manager.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave(variables)))


def write_config(workdir: epath.Path, text: str) -> None:
    """Writes ``config.json`` from the first process, whole or not at all."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(workdir / "config.json", text)


def read_config(workdir: epath.Path) -> dict | None:
    """The config of the run in this folder, or None if there is no run.

    Raises:
      ValueError: there is a ``config.json``, but it isn't one of ours.
    """
    file = workdir / "config.json"
    if not file.exists():
        return None
    try:
        config = json.loads(file.read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is damaged; restore it, or choose another --workdir")
    return config
