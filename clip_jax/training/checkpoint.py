"""Saving and restoring a run: the state, the data position and what the data was, with orbax alone.

A folder of a step that a crash left half-written, or that a disk has damaged, is passed over for the one before it.
"""

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from clip_jax.errors import FailedError, first_line, one_line
from clip_jax.files import write_whole
from clip_jax.training.step import TrainState

logger = logging.getLogger("clip_jax")


class CheckpointError(FailedError):
    """A run has checkpoints, and none of them can be read; or one cannot be written."""


class Restored(NamedTuple):
    """``state`` lives where the template's shardings say; ``position`` counts the examples drawn by all hosts."""

    state: TrainState
    position: int
    data_fingerprint: str


class Checkpointer:
    """Saves to ``workdir/checkpoints/<step>``, in the background, keeping the newest ``keep``."""

    def __init__(self, workdir: epath.Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(absolute(workdir) / "checkpoints", options=options)

    def save(self, step: int, state: TrainState, position: int, data_fingerprint: str) -> None:
        """Starts a save; returns before it is on disk, but after the state may be donated.

        Raises:
          CheckpointError: the folder cannot be written to, or the save before this one has failed.
        """
        extra = {"position": position, "data_fingerprint": data_fingerprint}
        saved = ocp.args.Composite(state=ocp.args.StandardSave(_saved_part(state)), data=ocp.args.JsonSave(extra))
        with self._explained():
            self._manager.save(step, args=saved, force=True)

    def preempted(self, step: int) -> bool:
        """Whether any host has been told to stop (SIGTERM); all hosts get the same answer at the same step."""
        return self._manager.reached_preemption(step)

    def restore_latest(self, template: TrainState) -> Restored | None:
        """The newest step that every host can read in full, or None if there is none yet.

        Newer steps that cannot be read are set aside, as ``damaged_checkpoint_<step>`` in the run's folder, once an
        older one has been restored; until then nothing is touched.

        Raises:
          CheckpointError: there are steps, but none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for number, step in enumerate(steps):
            restored = None
            try:
                restored = self._restore(step, template)
            except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
                logger.warning("checkpoint %d cannot be read and is skipped: %s", step, first_line(error))
            if np.all(multihost_utils.process_allgather(np.array(restored is not None))):
                for damaged in steps[:number]:
                    self._set_aside(damaged)
                return restored
        if steps:
            raise CheckpointError(f"none of the checkpoints in {self._manager.directory} can be read: {steps}")
        return None

    def _restore(self, step: int, template: TrainState) -> Restored:
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(_saved_part(template)), data=ocp.args.JsonRestore()),
        )
        return Restored(TrainState(**({"batch_stats": {}} | restored.state)), **restored.data)

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            damaged = self._manager.directory / str(step)
            target = self._manager.directory.parent / f"damaged_checkpoint_{step}"
            if target.exists():
                target.rmtree()
            damaged.rename(target)
        multihost_utils.sync_global_devices(f"set aside checkpoint {step}")
        self._manager.reload()

    def wait(self) -> None:
        """Returns when every save is on disk.

        Raises:
          CheckpointError: one of them has failed.
        """
        with self._explained():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many kinds for a full disk or a lost permission
            reason = one_line(error, longest=300)
            raise CheckpointError(f"a checkpoint cannot be written to {self._manager.directory}: {reason}") from error

    def close(self) -> None:
        """Waits for saves under way and ends the background threads."""
        self._manager.close()


def absolute(folder: str | os.PathLike) -> epath.Path:
    """The folder by its full path, ``~`` and symbolic links resolved; an address in a bucket is returned unchanged.

    orbax returns no metadata for a relative path, without an error.
    """
    if "://" in os.fspath(folder):
        return epath.Path(folder)
    # Not epath's resolve(): it takes the ".." of link/.. for the folder that holds the link.
    return epath.Path(pathlib.Path(folder).expanduser().resolve())


def _saved_part(state: TrainState) -> dict:
    """Without ``batch_stats`` where the model has none: orbax would take their absence for another tree."""
    return {name: value for name, value in state._asdict().items() if name != "batch_stats" or value}


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
