"""Feeds the training loop with this host's batches, and counts and lists the bad samples that were replaced."""

import logging
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.data.bad_samples import REASONS, BadSample, BadSamples
from clip_jax.data.decoded_cache import DecodedCache
from clip_jax.data.pipeline import Batches, Host, LoadPair, Workers, transform_of
from clip_jax.errors import one_line
from clip_jax.history import active, next_batch, segment_at
from clip_jax.models.presets import model_preset
from clip_jax.training.preparation import Run

logger = logging.getLogger("clip_jax")


class Batch(NamedTuple):
    """This host's part of one global batch.

    Attributes:
      inputs: of the training step, arrays ``[B / hosts, ...]`` by name.
      bad: int64 ``[B / hosts]``, indices of the samples that were replaced, -1 for the others.
      bad_reasons: int8 ``[B / hosts]``, indices into ``REASONS``, -1 for samples that were not replaced.
    """

    inputs: dict[str, np.ndarray]
    bad: np.ndarray
    bad_reasons: np.ndarray


def order_seed(seed: int, data_changes: int) -> int:
    """Returns the seed of the order of the data, which differs after each change of the data."""
    return int(np.random.SeedSequence([seed, data_changes]).generate_state(1)[0]) if data_changes else seed


class Feed:
    """Yields this host's batches from a data position on, and keeps track of bad samples.

    With ``config.progressive_resolution`` the images of the first steps are smaller.
    """

    def __init__(self, run: Run, step: int):
        """``step`` steps have been trained."""
        self._run, self._segments = run, active(run.history) or [run.settings]
        host = jax.process_index()
        self._bad_samples = BadSamples(run.workdir / f"bad_samples{f'-{host}' if host else ''}.jsonl")
        self._image_size = self._image_size_at(step)
        self._position = next_batch(self._segments, step)[1]
        self._batches = self._open(step)

    @property
    def position(self) -> int:
        """The number of examples that all hosts have drawn, or passed over, so far."""
        return self._position

    def next(self, step: int) -> Batch:
        """Returns the batch to train on after ``step`` steps; counts and lists its bad samples.

        Raises:
          InputError: the data cannot be used or read.
        """
        number, position = next_batch(self._segments, step)
        if (size := self._image_size_at(step)) != self._image_size or position != self._position:
            if position != self._position:
                logger.info("passed over the batches before %d (config.data.skip_batches)", number)
            self._image_size = size
            self._batches.close()
            self._batches = self._open(step)
        inputs = dict(next(self._batches))
        self._position = position + self._run.config.global_batch_size
        batch = Batch(inputs, inputs.pop("bad"), inputs.pop("bad_reason"))
        if not self._run.config.model.patch_dropout:
            inputs.pop("seed")  # only patch dropout draws random numbers
        if len(self._run.mixture.sources) == 1:
            inputs.pop("source")  # the loss of the only source equals the loss
        self._bad_samples.count(batch.bad_reasons)
        self._list_bad_samples(batch)
        return batch

    def scalars(self) -> dict[str, float]:
        """Returns metrics: bad samples of all hosts since the start, by reason, and epochs, by source.

        Raises:
          TooManyBadSamplesError: on all hosts, at the same step.
        """
        local = np.append(self._bad_samples.counts, self._bad_samples.seen)
        halves = np.stack(np.divmod(local, 2**30)).astype(np.int32)  # JAX would truncate to 32 bits
        high, low = multihost_utils.process_allgather(halves).reshape(-1, *halves.shape).astype(np.int64).sum(axis=0)
        *counts, seen = (high * 2**30 + low).tolist()
        self._bad_samples.check(counts, seen, self._run.config.data.max_bad_share)
        scalars = {"bad_samples": sum(counts)}
        scalars |= {f"bad_samples/{reason}": count for reason, count in zip(REASONS, counts, strict=True) if count}
        epochs = self._run.mixture.epochs(self.position - self._segments[-1].data_start)
        return scalars | {f"epochs/{name}" if len(epochs) > 1 else "epochs": value for name, value in epochs.items()}

    def close(self) -> None:
        """Ends the worker processes."""
        self._batches.close()

    def _image_size_at(self, step: int) -> int:
        first, full = self._run.config.progressive_resolution, self._run.config.model.vision.image_size
        return first.image_size if step < first.steps else full

    def _open(self, step: int) -> Batches:
        config, segment = self._run.config, segment_at(self._segments, step)
        transform = transform_of(config.data, model_preset(config), self._image_size)
        return Batches(
            LoadPair(self._run.mixture, transform, DecodedCache(config.data.cache_mebibytes)),
            config.global_batch_size,
            order_seed(config.seed, segment.data_changes),
            Host(jax.process_index(), jax.process_count()),
            Workers(config.data.num_workers, config.data.num_threads),
            next_batch(self._segments, step)[1] - segment.data_start,
        )

    def _list_bad_samples(self, batch: Batch) -> None:
        is_bad = batch.bad >= 0
        if not is_bad.any():
            return
        config, found = self._run.config, []
        transform = transform_of(config.data, model_preset(config), config.model.vision.image_size)
        for index, reason in zip(batch.bad[is_bad].tolist(), batch.bad_reasons[is_bad].tolist(), strict=True):
            if not self._bad_samples.is_new(index):
                continue
            name, message = f"record {index}", "it could be read at the second attempt"
            try:
                pair = self._run.mixture[index]
                name = pair.key
                transform.check(pair)
            except Exception as error:  # any type makes the pipeline replace the sample
                message = one_line(error)
            found.append(BadSample(index, REASONS[reason], name, message))
            logger.warning("replaced a bad sample by another one: %s: %s", name, message)
        if found:
            self._bad_samples.add_to_list(found)
