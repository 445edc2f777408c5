"""Saves and restores a training with orbax: the state, the data position and the data's fingerprint.

A checkpoint that cannot be read or is damaged, as after a crash or a disk fault, is skipped for the one before it.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from clip_jax import saved_arrays
from clip_jax.digests import DamagedError
from clip_jax.errors import one_line
from clip_jax.run_folder import (
    MISSING_DIGESTS,
    MISSING_SEAL,
    CheckpointError,
    DataState,
    absolute,
    check_position,
    check_step,
    read_data_state,
    warn_of_skipped,
    warn_of_unverified,
    write_data_state,
)
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

    def __init__(
        self,
        workdir: epath.Path,
        keep: int,
        position_at: Callable[[int], int] | None = None,
        keep_every: int = 0,
    ):
        """``position_at`` returns the data position after a step. A checkpoint with another one is damaged.

        The multiples of ``keep_every`` are kept for good.
        """
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, cleanup_tmp_directories=True
        )
        items = {"state": saved_arrays.handler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = _Manager(absolute(workdir) / "checkpoints", options=options, item_handlers=items)
        self._position_at = position_at

    def save(self, step: int, state: TrainState, position: int, data_fingerprint: str) -> None:
        """Starts a save. Returns before it is on disk; the caller may then donate the state.

        Raises:
          CheckpointError: the folder cannot be written to, or the previous save has failed.
        """
        saved = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_saved_part(state)),
            data=ocp.args.JsonSave(write_data_state(DataState(step, position, data_fingerprint))),
        )
        with self._explained():
            self._manager.save(step, args=saved, force=True)

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def is_saving(self) -> bool:
        """Returns whether a save in the background is not finished."""
        return self._manager.is_saving_in_progress()

    def restore_latest(self, template: TrainState) -> Restored | None:
        """Returns the newest checkpoint that is whole on every host, or None if there is none yet.

        Newer ones that cannot be read or are damaged are renamed to ``damaged_checkpoint_<step>`` in the run's folder,
        but only after an older one has been restored.

        Raises:
          CheckpointError: there are checkpoints, but none is whole.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for number, step in enumerate(steps):
            restored = None
            try:
                restored = self._restore(step, template)
            except Exception as error:  # orbax and tensorstore raise many types for a damaged file
                warn_of_skipped(step, error)
            if np.all(multihost_utils.process_allgather(np.array(restored is not None))):
                for damaged in steps[:number]:
                    self._set_aside(damaged)
                return restored
        if steps:
            raise CheckpointError(f"none of the checkpoints in {self._manager.directory} can be read: {steps}")
        return None

    def restore_step(self, step: int, template: TrainState) -> Restored:
        """Returns the checkpoint of this step.

        Raises:
          CheckpointError: it is not whole on every host.
        """
        restored, reason = None, "another host cannot read it"
        try:
            restored = self._restore(step, template)
        except Exception as error:  # as in restore_latest
            reason = saved_arrays.explain(error)
        if not np.all(multihost_utils.process_allgather(np.array(restored is not None))):
            raise CheckpointError(f"checkpoint {step} in {self._manager.directory} cannot be restored: {reason}")
        return restored

    def set_aside_after(self, step: int, folder: epath.Path) -> None:
        """Moves the checkpoints of later steps to a folder, which need not exist. All hosts call it."""
        if jax.process_index() == 0:
            for later in self._manager.all_steps():
                if later > step:
                    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
                    (self._manager.directory / str(later)).rename(folder / "checkpoints" / str(later))
        multihost_utils.sync_global_devices(f"set aside checkpoints after {step}")
        self._manager.reload()

    def _restore(self, step: int, template: TrainState) -> Restored:
        # Not the manager's restore(): it is a barrier, at which a host would wait for one that has found damage.
        folder = self._manager.directory / str(step)
        data, is_sealed = read_data_state(folder, step)
        if self._position_at:
            check_position(data, self._position_at(step))
        if saved_arrays.has_digests(folder / "state") != is_sealed:
            raise DamagedError(MISSING_DIGESTS if is_sealed else MISSING_SEAL)
        restored = saved_arrays.restore_like(folder / "state", _saved_part(template))
        check_step(restored, step)
        if not is_sealed:
            warn_of_unverified(step)
        return Restored(TrainState(**({"batch_stats": {}} | restored)), data.position, data.data_fingerprint)

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
        """Waits for unfinished saves and ends the background threads. Logs a failure since :meth:`wait`."""
        try:
            with self._explained():
                self._manager.close()
        except CheckpointError as error:  # not raised, to keep an error that ends the training
            logger.warning("%s", error)


def _saved_part(state: TrainState) -> dict:
    """Returns the fields to save, without empty ``batch_stats``: orbax would restore these as a different tree."""
    return {name: value for name, value in state._asdict().items() if name != "batch_stats" or value}
