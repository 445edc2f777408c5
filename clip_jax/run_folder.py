"""Reads and writes the files in a run's folder, for code that does not train: config, parameters, data fingerprint.

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
from clip_jax.files import write_atomically

logger = logging.getLogger("clip_jax")


class CheckpointError(FailedError):
    """No checkpoint of a run can be read, or one cannot be written."""


def absolute(folder: str | os.PathLike) -> epath.Path:
    """Returns the absolute path, with ``~`` and symbolic links resolved. A bucket's address is returned unchanged.

    For a relative path orbax returns no metadata, and reports no error.
    """
    if "://" in os.fspath(folder):
        return epath.Path(folder)
    # Not epath's resolve(): it resolves link/.. to the folder that contains the link.
    return epath.Path(pathlib.Path(folder).expanduser().resolve())


def saved_fingerprint(workdir: epath.Path) -> str | None:
    """Returns the fingerprint of the data from the newest readable checkpoint, or None if there is none."""
    workdir = absolute(workdir)
    if not (workdir / "checkpoints").exists():
        return None
    with _read_only(workdir) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                restored = manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))
            except Exception:  # damaged: restoring reports it
                continue
            return restored.data["data_fingerprint"]
    return None


def _read_only(workdir: epath.Path) -> ocp.CheckpointManager:
    # Not read_only=True: orbax logs warnings for it.
    return ocp.CheckpointManager(workdir / "checkpoints", options=ocp.CheckpointManagerOptions(create=False))


def restore_variables(workdir: epath.Path) -> dict:
    """Returns ``params`` and ``batch_stats`` of the newest checkpoint that can be read, as numpy arrays.

    Raises:
      FileNotFoundError: the run has no checkpoint.
      CheckpointError: there are checkpoints, but none can be read.
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
    saved = handler.metadata(state).tree  # not the Checkpointer's: it looks for a step's file, and warns
    wanted = {name: saved.get(name) or {} for name in ("params", "batch_stats")}
    arguments = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted),
        partial_restore=True,
    )
    return {"batch_stats": {}} | ocp.Checkpointer(handler).restore(state, args=arguments)


def save_variables(workdir: epath.Path, variables: dict) -> None:
    """Writes ``params`` and ``batch_stats`` as the checkpoint of step 0, for :func:`restore_variables`."""
    with ocp.CheckpointManager(absolute(workdir) / "checkpoints") as manager:
        manager.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave(variables)))


def write_config(workdir: epath.Path, text: str) -> None:
    """Writes ``config.json`` from the first process, atomically."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(workdir / "config.json", text)


def read_config(workdir: epath.Path) -> dict | None:
    """Returns the config of the run in this folder, or None if there is no run.

    Raises:
      ValueError: ``config.json`` is not a JSON object.
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
