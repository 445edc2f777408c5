"""Saves and restores a training with orbax: the state, the data position and the data's fingerprint.

A checkpoint that cannot be read, as after a crash or a disk fault, is skipped for the one before it.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from clip_jax.errors import first_line, one_line
from clip_jax.run_folder import CheckpointError, absolute
from clip_jax.training.state import TrainState

logger = logging.getLogger("clip_jax")


class Restored(NamedTuple):
    """A restored checkpoint. ``state`` has the template's shardings; ``position`` is examples drawn by all hosts."""

    state: TrainState
    position: int
    data_fingerprint: str


class _Manager(ocp.CheckpointManager):
    """Leaves JAX's agreement about the step at which a pod stops to the training loop.

    Orbax takes part in it for its statistics, also from a background thread and with older steps. JAX then waits for a
    step that no host reaches any more.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpointer:
    """Saves to ``workdir/checkpoints/<step>`` in the background, and keeps the newest ``keep`` checkpoints."""

    def __init__(self, workdir: epath.Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = _Manager(absolute(workdir) / "checkpoints", options=options)

    def save(self, step: int, state: TrainState, position: int, data_fingerprint: str) -> None:
        """Starts a save. Returns before it is on disk; the caller may then donate the state.

        Raises:
          CheckpointError: the folder cannot be written to, or the previous save has failed.
        """
        extra = {"position": position, "data_fingerprint": data_fingerprint}
        saved = ocp.args.Composite(state=ocp.args.StandardSave(_saved_part(state)), data=ocp.args.JsonSave(extra))
        with self._explained():
            self._manager.save(step, args=saved, force=True)

    def is_saving(self) -> bool:
        """Returns whether a save in the background is not finished."""
        return self._manager.is_saving_in_progress()

    def restore_latest(self, template: TrainState) -> Restored | None:
        """Returns the newest checkpoint that every host can read, or None if there is none yet.

        Newer ones that cannot be read are renamed to ``damaged_checkpoint_<step>`` in the run's folder, but only after
        an older one has been restored.

        Raises:
          CheckpointError: there are checkpoints, but none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for number, step in enumerate(steps):
            restored = None
            try:
                restored = self._restore(step, template)
            except Exception as error:  # orbax and tensorstore raise many types for a damaged file
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
        """Waits until every save is on disk.

        Raises:
          CheckpointError: one of them has failed.
        """
        with self._explained():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many types for a full disk or a lost permission
            reason = one_line(error, longest=300)
            raise CheckpointError(f"a checkpoint cannot be written to {self._manager.directory}: {reason}") from error

    def close(self) -> None:
        """Waits for unfinished saves and ends the background threads."""
        self._manager.close()


def _saved_part(state: TrainState) -> dict:
    """Returns the fields to save, without empty ``batch_stats``: orbax would restore these as a different tree."""
    return {name: value for name, value in state._asdict().items() if name != "batch_stats" or value}
