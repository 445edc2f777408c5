"""Reads and writes the files in a run's folder, for code that does not train: config, parameters, data fingerprint.

A checkpoint that cannot be read or is damaged is skipped, with a warning, for the one before it.
"""

import json
import logging
import os
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from clip_jax import saved_arrays
from clip_jax.digests import DamagedError, seal, unseal
from clip_jax.errors import FailedError
from clip_jax.files import write_atomically
from clip_jax.history import active, first_segment, position_after, read_history

MISSING_DIGESTS = "state/digests is missing"
MISSING_SEAL = "data/metadata has no digest, but the arrays have"
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


class DataState(NamedTuple):
    """What a checkpoint holds of the data: its step, the examples drawn by all hosts, and the data's fingerprint."""

    step: int
    position: int
    data_fingerprint: str


def write_data_state(data: DataState) -> dict:
    """Returns the JSON object for the item ``data`` of a checkpoint, with its digest."""
    return seal(data._asdict())


def read_data_state(checkpoint: epath.Path, step: int) -> tuple[DataState, bool]:
    """Returns what the item ``data`` of a checkpoint holds, and whether it has a digest.

    Raises:
      DamagedError: it is missing, damaged or of another step.
    """
    name = "data/metadata"
    try:
        text = (checkpoint / name).read_bytes()
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror or error}") from None
    content, is_sealed = unseal(text, name)
    if not is_sealed:
        content["step"] = step  # earlier versions did not write it
    types = DataState.__annotations__
    if content.keys() != types.keys() or not all(type(content[key]) is types[key] for key in types):
        raise DamagedError(f"{name} is damaged: {content}")
    check_step(content, step)
    return DataState(**content), is_sealed


def check_step(saved: dict, step: int) -> None:
    """Raises DamagedError if the state or the data of a checkpoint is of another step than its folder."""
    if int(saved["step"]) != step:
        raise DamagedError(f"it holds step {int(saved['step'])}")


def check_position(data: DataState, expected: int) -> None:
    """Raises DamagedError if a checkpoint has another data position than expected."""
    if data.position != expected:
        raise DamagedError(f"its data position is {data.position}, but {expected} after {data.step} steps")


def warn_of_skipped(step: int, error: Exception) -> None:
    """Logs that a checkpoint is skipped."""
    state = "is damaged" if isinstance(error, DamagedError) else "cannot be read"
    logger.warning("checkpoint %d %s and is skipped: %s", step, state, saved_arrays.explain(error))


def warn_of_unverified(step: int) -> None:
    """Logs, on the first host, that a checkpoint has no digests."""
    if jax.process_index() == 0:
        logger.warning("checkpoint %d was saved by an earlier version, without digests, and cannot be verified", step)


def saved_fingerprint(workdir: epath.Path) -> str | None:
    """Returns the fingerprint of the data from the newest checkpoint where it is whole, or None if there is none."""
    workdir = absolute(workdir)
    for step in _newest_first(workdir):
        try:
            data, _ = read_data_state(workdir / "checkpoints" / str(step), step)
        except DamagedError:  # restoring reports it
            continue
        return data.data_fingerprint
    return None


def _newest_first(workdir: epath.Path) -> list[int]:
    if not (workdir / "checkpoints").exists():
        return []
    # Not read_only=True: orbax logs warnings for it.
    with ocp.CheckpointManager(workdir / "checkpoints", options=ocp.CheckpointManagerOptions(create=False)) as manager:
        return sorted(manager.all_steps(), reverse=True)


def restore_variables(workdir: epath.Path) -> dict:
    """Returns ``params`` and ``batch_stats`` of the newest checkpoint where they are whole, as numpy arrays.

    Raises:
      FileNotFoundError: the run has no checkpoint.
      CheckpointError: there are checkpoints, but none is whole.
    """
    workdir = absolute(workdir)
    steps = _newest_first(workdir)
    for step in steps:
        try:
            return _restore_variables(workdir / "checkpoints" / str(step), step)
        except Exception as error:
            warn_of_skipped(step, error)
    if steps:
        raise CheckpointError(f"none of the checkpoints in {workdir / 'checkpoints'} can be read: {steps}")
    raise FileNotFoundError(f"{workdir} has no checkpoint")


def _restore_variables(checkpoint: epath.Path, step: int) -> dict:
    state = checkpoint / "state"
    is_verified = saved_arrays.has_digests(state)
    if not is_verified and (checkpoint / "data").exists() and read_data_state(checkpoint, step)[1]:
        raise DamagedError(MISSING_DIGESTS)
    variables = saved_arrays.restore_as_numpy(state, ("step", "params", "batch_stats"))
    check_step({"step": variables.pop("step", step)}, step)
    if not is_verified:
        warn_of_unverified(step)
    return {"batch_stats": {}} | variables


def save_variables(workdir: epath.Path, variables: dict) -> None:
    """Writes ``params`` and ``batch_stats`` as the checkpoint of step 0, for :func:`restore_variables`."""
    folder, items = absolute(workdir) / "checkpoints", {"state": saved_arrays.handler()}
    with ocp.CheckpointManager(folder, item_handlers=items) as manager:
        saved = ocp.args.PyTreeSave(jax.tree.map(np.asarray, variables))
        manager.save(0, args=ocp.args.Composite(state=saved))


def examine_checkpoint(workdir: epath.Path, step: int) -> tuple[list[str], bool]:
    """Returns one line for each damage to a checkpoint, and whether it has digests. Uses no device.

    A checkpoint by :func:`save_variables` has no data position.
    """
    checkpoint, problems, is_sealed = workdir / "checkpoints" / str(step), [], None
    state = checkpoint / "state"
    try:
        damage, single = saved_arrays.find_damage(state)
        problems += damage
        check_step(single if "step" in single else {"step": step}, step)
    except Exception as error:  # orbax and tensorstore raise many types
        single = {"step": step}
        problems.append(saved_arrays.explain(error))
    if "step" in single:
        try:
            data, is_sealed = read_data_state(checkpoint, step)
            problems += _position_problems(workdir, data)
        except DamagedError as error:
            problems.append(str(error))
    is_verified = saved_arrays.has_digests(state)
    if is_sealed is not None and is_sealed != is_verified:
        problems.append(MISSING_DIGESTS if is_sealed else MISSING_SEAL)
    return problems, is_verified


def _position_problems(workdir: epath.Path, data: DataState) -> list[str]:
    try:
        config, segments = read_config(workdir), active(read_history(workdir))
        if config:
            segments = segments or [first_segment(config["global_batch_size"])]
            check_position(data, position_after(segments, data.step))
    except DamagedError as error:
        return [str(error)]
    except (ValueError, FailedError):  # the config or the history is damaged, and not the checkpoint
        return []
    return []


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
