"""Checks the folder, the data, the devices and the hosts of a training before anything is written."""

import hashlib
import logging
import math
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from clip_jax.config import check_allowed, check_same_run, to_json
from clip_jax.data.images import ImageError
from clip_jax.data.pipeline import TRANSFORM_VERSION, Transform, transform_of
from clip_jax.data.sources import Mixture, Pair, PairError, open_mixture
from clip_jax.data.sources.buckets import access_of, use_access
from clip_jax.evaluation.evaluations import Evaluations
from clip_jax.evaluation.registry import find_tasks
from clip_jax.history import Segment, first_segment, read_history
from clip_jax.losses import starting_parameters
from clip_jax.models.presets import model_preset
from clip_jax.run_folder import CheckpointError, absolute, read_config, saved_fingerprint
from clip_jax.sharding import check_batch_divides
from clip_jax.training.state import configured_mesh
from clip_jax.weights import digest_of, read_weights
from clip_jax.weights.resizing import at_image_size

logger = logging.getLogger("clip_jax")

FIRST_PAIRS = 100  # of each source, of which one must be good


class Resumption(NamedTuple):
    """How a run goes on: from the checkpoint of ``from_step``, or None for the newest, with these changed keys."""

    from_step: int | None = None
    allow_changed: tuple[str, ...] = ()


class Run(NamedTuple):
    """A run that has passed all checks and has not written anything yet.

    ``history`` has the segments so far, and ``settings`` those of now, for :func:`clip_jax.history.continued`.
    """

    config: ml_collections.ConfigDict
    workdir: epath.Path
    mixture: Mixture
    evaluations: Evaluations
    mesh: Mesh
    steps: int
    data_fingerprint: str
    arguments: tuple[str, ...]
    history: tuple[Segment, ...]
    settings: Segment
    previous: dict | None  # the config with which the run has trained so far


def prepare(
    config: ml_collections.ConfigDict,
    workdir: str,
    arguments: Sequence[str] = (),
    resumption: Resumption = Resumption(),  # noqa: B008 (it cannot be changed)
) -> Run:
    """Checks the folder, the data, and that the batch can be split over the devices; writes nothing.

    ``config`` must have passed :func:`clip_jax.config.validate`. ``arguments`` of the command are for the report.

    Raises:
      ValueError, OSError: a check failed; the message states what is wrong, where, and how to fix it.
    """
    folder = check_workdir(workdir)
    saved = read_config(folder)
    check_allowed(resumption.allow_changed)
    changed = check_same_run(config, saved, workdir, resumption.allow_changed) if saved is not None else {}
    mesh = configured_mesh(config)
    check_batch_divides(config.global_batch_size, mesh, config.accumulation_steps)
    use_access(access_of(config.data))
    mixture = open_mixture(config.data.source, config.data.weights)
    if config.global_batch_size > len(mixture):
        raise ValueError(
            f"config.global_batch_size={config.global_batch_size} is more than the {len(mixture):,} pairs of "
            f"config.data.source={config.data.source}: a batch would have the same pair twice"
        )
    check_first_pairs(mixture, transform_of(config.data, model_preset(config), config.model.vision.image_size))
    fingerprint = f"{mixture.fingerprint()}-{len(mixture)}-seed{config.seed}-transform{TRANSFORM_VERSION}"
    before = saved_fingerprint(folder)
    history = read_run_history(folder, saved, before)
    steps = history[-1].steps if history and not changed.keys() & {"steps", "epochs"} else 0
    steps = steps or config.steps or math.ceil(config.epochs * len(mixture) / config.global_batch_size)
    if (smaller := config.progressive_resolution.steps) >= steps:
        raise ValueError(
            f"config.progressive_resolution.steps={smaller} must be below the run's {steps} steps, or it never sees "
            "images of the model's size"
        )
    if before is not None and saved is None:
        raise ValueError(f"{workdir} holds checkpoints but no config.json; restore it, or choose another --workdir")
    known = history[-1].data_fingerprint if history else before
    if known not in (None, fingerprint) and not config.data.allow_changed:
        raise ValueError(
            f"{workdir} was trained on other data than config.data.source={config.data.source} now holds; restore that "
            "data, or go on with the new data: --config.data.allow_changed=true"
        )
    from_step = check_from_step(folder, resumption.from_step, history, changed)
    settings = Segment(
        *(0, 0, 0, config.global_batch_size, config.data.skip_batches, steps, fingerprint),
        changed=changed,
        from_step=from_step,
        time=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    )
    evaluations = open_evaluations(config)
    start = digest_of(read_initial_variables(config)) if config.init_from and before is None else ""
    agreed = (fingerprint, steps, start, dict(mesh.shape), to_json(config), resumption, history, changed)
    check_hosts_agree(" ".join(map(str, agreed)))
    return Run(
        config, folder, mixture, evaluations, mesh, steps, fingerprint, tuple(arguments), history, settings, saved
    )


def read_run_history(folder: epath.Path, saved: dict | None, fingerprint: str | None) -> tuple[Segment, ...]:
    """Returns the segments of a run that has a checkpoint, and none for a new run.

    Args:
      folder: of the run.
      saved: its config, or None.
      fingerprint: that of the data in its newest checkpoint, or None without a checkpoint.

    Raises:
      FailedError: the history is damaged.
    """
    if saved is None or fingerprint is None:
        return ()
    # Runs of earlier versions have no history.
    first = first_segment(saved["global_batch_size"])._replace(data_fingerprint=fingerprint)
    return tuple(read_history(folder)) or (first,)


def check_from_step(
    folder: epath.Path, step: int | None, history: Sequence[Segment], changed: dict[str, list]
) -> int | None:
    """Returns the step of ``--from-step``, or None if the run has already gone back to it with these settings.

    A script on a spot machine repeats its command, which must not throw away what was trained since.

    Raises:
      ValueError: there is no checkpoint of this step.
    """
    if step is None:
        return None
    returns = [segment for segment in history if segment.from_step is not None]
    if returns and returns[-1].from_step == step and not changed:
        logger.info("--from-step=%d was done at %s UTC; the newest checkpoint is taken", step, returns[-1].time)
        return None
    checkpoints = folder / "checkpoints"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
    if str(step) not in names:
        steps = ", ".join(map(str, sorted(int(name) for name in names if name.isdecimal())))
        raise ValueError(f"--from-step={step}: {folder} has no checkpoint of this step, only of: {steps or 'none'}")
    return step


def open_evaluations(config: ml_collections.ConfigDict) -> Evaluations:
    """Returns the tasks of ``config.evaluation``.

    Raises:
      ValueError, OSError: there is no such task, or its data is missing or damaged.
    """
    names, preset = config.evaluation.tasks, model_preset(config)
    evaluations = Evaluations(
        find_tasks(names) if names else [], preset.vision.image_size, config.evaluation.data, preset.preprocessing
    )
    for task in (*evaluations.missing, *evaluations.broken):
        how = f"; get it: {task.how_to_get}" if task.how_to_get else ""
        raise ValueError(f"config.evaluation.tasks={names}: {task.name}: {task.reason}{how}")
    return evaluations


def read_initial_variables(config: ml_collections.ConfigDict) -> dict:
    """Returns ``params`` and ``batch_stats`` from ``config.init_from``, for the model of the config.

    Parameters of a loss are kept only if ``config.loss`` has the same (:func:`clip_jax.losses.starting_parameters`).

    Raises:
      ValueError: there is no model, or it differs from the config's in more than the image size.
    """
    try:
        here = model_preset(config)
        weights = read_weights(
            config.init_from, assumed_activation=here.text.activation, assumed_preprocessing=here.preprocessing
        )
        variables = at_image_size(weights.variables, weights.preset, here)
    except (ValueError, OSError, CheckpointError) as error:
        raise ValueError(f"config.init_from={config.init_from}: {error}") from None
    return variables | {"params": starting_parameters(variables["params"], config.loss)}


def check_workdir(workdir: str) -> epath.Path:
    """Returns the absolute folder. Raises ValueError unless it exists or can be created, and can be written to."""
    if not workdir or "://" in workdir:
        raise ValueError(f"--workdir={workdir} must be a folder on a disk that all hosts share; mount a bucket first")
    folder = absolute(workdir)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--workdir={workdir}: {existing} is not a folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"--workdir={workdir}: {existing} cannot be written to")
    return folder


def check_first_pairs(mixture: Mixture, transform: Transform) -> None:
    """Raises ValueError if none of the first pairs of a source can be used: the whole source may be wrong."""
    for name, source in zip(mixture.names, mixture.sources, strict=True):
        problems = []
        for index in range(min(FIRST_PAIRS, len(source))):
            try:
                pair = source[index]
                problem = _problem_of(pair, transform)
            except PairError as error:
                problem = str(error)
            if not problem:
                break
            problems.append(problem)
        else:
            raise ValueError(
                f"config.data.source={name}: none of its first {len(problems)} pairs can be used: {problems[0]}"
            )


def _problem_of(pair: Pair, transform: Transform) -> str:
    try:
        transform.check(pair)
    except ImageError as error:
        return f"the image of {pair.key}: {error}"
    return ""


def check_hosts_agree(what: str) -> None:
    """Raises ValueError if hosts were started with different configs or read different data.

    It is also a barrier: no host writes to the folder while another still reads it.
    """
    digest = np.frombuffer(hashlib.sha256(what.encode()).digest(), np.uint8)
    if not np.all(multihost_utils.process_allgather(digest).reshape(-1, len(digest)) == digest):
        raise ValueError(
            "the hosts differ in config, data, the weights to start from or a device's memory; all need the same flags "
            "and the same files, and with unlike devices --config.mesh.fsdp"
        )
