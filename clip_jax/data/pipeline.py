"""Shuffles, decodes and batches the training pairs; one number, the position, is enough to resume.

Everything up to batching is random access, so batch ``k`` depends only on (source, seed, k): it is the same for any
number of hosts, workers and threads, and after any interruption.
"""

import contextlib
import dataclasses
import multiprocessing
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import grain
import ml_collections
import numpy as np

from clip_jax.data.bad_samples import REASONS
from clip_jax.data.decoded_cache import DecodedCache
from clip_jax.data.images import Augmentation, ImageError, decode_for_training, decode_pixels, training_transform
from clip_jax.data.sources import Mixture, Pair, PairError, ShardError
from clip_jax.data.sources.buckets import current_access, use_access
from clip_jax.data.tokenizer import tokenize
from clip_jax.data.workers import end_with_parent, ignoring_interrupts
from clip_jax.errors import FailedError, one_line
from clip_jax.models.preprocessing import OPENAI_PREPROCESSING, Preprocessing

if TYPE_CHECKING:  # the worker processes that decode images must not import models
    from clip_jax.models.presets import CLIPPreset

# Raise this whenever the same pairs would give other pixels or tokens: older runs then refuse to resume.
TRANSFORM_VERSION = 3
MAX_PART_SIZE = 256  # examples
# Where the largest index is one of these, Grain's shuffle (0.2.18) is not a permutation: it maps index 0 to the same
# position.
BROKEN_MAX_INDICES = {4**power for power in range(8, 32)}


class InputError(FailedError):
    """The input cannot continue: a shard is lost, a worker has died, or too many samples in a row are bad."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """Turns an encoded pair into the arrays that the towers take.

    Images with a side below ``min_side`` px or a ratio of sides above ``max_aspect_ratio`` are replaced.
    """

    image_size: int
    context_length: int
    augmentation: Augmentation
    min_side: int = 1
    max_aspect_ratio: float = 100.0
    preprocessing: Preprocessing = OPENAI_PREPROCESSING

    def decode(self, pair: Pair) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns the image's pixels, uint8 ``[H, W, 3]``, and its width and height before any reduction.

        Raises:
          ImageError: the image cannot be used.
        """
        limits = (self.min_side, self.max_aspect_ratio)
        return decode_for_training(pair.image, self.image_size, self.augmentation, *limits, self.preprocessing)

    def __call__(
        self, pair: Pair, pixels: np.ndarray, size: tuple[int, int], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Returns ``tokens`` int32 ``[L]`` of one caption and ``image`` uint8 ``[S, S, 3]`` of decoded pixels."""
        caption = draw_caption(pair, rng)
        image = training_transform(pixels, self.image_size, rng, self.augmentation, size, self.preprocessing)
        return {"tokens": tokenize(caption, self.context_length, truncate=True)[0], "image": image}

    def check(self, pair: Pair) -> None:
        """Raises ImageError if the image cannot be used."""
        decode_pixels(pair.image, self.min_side, self.max_aspect_ratio)


def transform_of(data: ml_collections.ConfigDict, preset: "CLIPPreset", image_size: int) -> Transform:
    """Returns the transform of ``config.data`` and the model, to images of ``image_size`` pixels."""
    return Transform(
        image_size,
        preset.text.context_length,
        Augmentation(**data.augmentation),
        data.min_image_side,
        data.max_aspect_ratio,
        preset.preprocessing.at_image_size(preset.vision.image_size, image_size),
    )


@dataclasses.dataclass(frozen=True)
class LoadPair:
    """Loads the training example at an index. A single bad sample is not an error.

    A bad sample is replaced by another one of its source, mostly the next, which keeps every count exact. The example
    then has the index and the reason of the bad sample, too.
    """

    mixture: Mixture
    transform: Transform
    cache: DecodedCache = dataclasses.field(default_factory=lambda: DecodedCache(0))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"access": current_access()}

    def __setstate__(self, state: dict) -> None:
        use_access(state.pop("access"))
        self.__dict__.update(state)
        # Unpickling is the only moment at which our code runs in a worker process before it starts to read.
        if multiprocessing.parent_process():
            end_with_parent()

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Loads one example.

        Returns:
          ``image`` uint8 ``[S, S, 3]``, ``tokens`` int32 ``[L]``, ``seed`` uint32 for what the step draws for this
          pair at this visit, ``source`` int32, the index of its source in the mixture, and of a sample that was
          replaced ``bad`` int64, its index, and ``bad_reason`` int8, the index in ``REASONS``; else both are -1.

        Raises:
          InputError: the record and all that may replace it are bad.
          ShardError: the file of the record is lost.
        """
        problem, tried = None, 0
        for candidate in self.mixture.replacements(index):
            try:
                example = self.transform(*self._decoded(candidate), rng)
            except ShardError:
                raise
            except Exception as error:  # data from the web raises errors of any kind
                problem, tried = problem or error, tried + 1
                continue
            return example | {
                "bad": np.int64(index if problem else -1),
                "bad_reason": np.int8(REASONS.index(reason_of(problem)) if problem else -1),
                "source": np.int32(self.mixture.locate(index)[0]),
                "seed": rng.integers(2**32, dtype=np.uint32),  # drawn last, so that earlier draws do not depend on it
            }
        name = self.mixture.names[self.mixture.locate(index)[0]]
        raise InputError(
            f"{name}: record {index} is bad, and so are the {tried - 1} records that were tried in its place: {problem}"
        )

    def _decoded(self, index: int) -> tuple[Pair, np.ndarray, tuple[int, int]]:
        if (cached := self.cache.get(index)) is not None:
            return cached
        pair = self.mixture[index]
        pixels, size = self.transform.decode(pair)
        self.cache.add(index, pair, pixels, size)
        return pair, pixels, size


def reason_of(problem: Exception) -> str:
    """Returns which of ``REASONS`` the error of a bad sample counts as."""
    return problem.reason if isinstance(problem, ImageError | PairError) else "damaged_record"


def draw_caption(pair: Pair, rng: np.random.Generator) -> str:
    """Draws one of a pair's captions, by their proportions if it has any, else uniformly."""
    if not pair.proportions:
        return pair.captions[rng.integers(len(pair.captions))]
    ends = np.cumsum(pair.proportions)
    return pair.captions[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))]


class Host(NamedTuple):
    """Which of how many hosts this one is."""

    index: int = 0
    count: int = 1


class Workers(NamedTuple):
    """What reads and decodes on this host: worker processes, or with 0 this process, each with so many threads."""

    processes: int = 0
    threads: int = 1


ONE_HOST, NO_WORKERS = Host(), Workers()


class Batches(Iterator[dict[str, np.ndarray]]):
    """Yields this host's share of each global batch, forever: the fields of :class:`LoadPair` with a leading axis B.

    Args:
      load_pair: loads one example.
      global_batch_size: number of examples over all hosts.
      seed: seed of the order and of the transform.
      host: this host.
      workers: what reads and decodes.
      position: number of examples that all hosts have drawn before; give it to resume.

    Raises:
      ValueError: the hosts cannot share the batch equally.
    """

    def __init__(
        self,
        load_pair: LoadPair,
        global_batch_size: int,
        seed: int,
        host: Host = ONE_HOST,
        workers: Workers = NO_WORKERS,
        position: int = 0,
    ):
        _parse_absl_flags()
        examples = order(load_pair.mixture, seed).random_map(load_pair)
        local_batch_size, uneven = divmod(global_batch_size, host.count)
        if uneven:
            raise ValueError(
                f"a global batch of {global_batch_size} cannot be divided among {host.count} hosts; choose a multiple"
            )
        # One Grain thread makes a whole batch. Large batches are made in parts, so that all threads work on the first.
        self._parts = local_batch_size // _largest_divisor(local_batch_size, MAX_PART_SIZE)
        ahead = -(-2 * self._parts // max(1, workers.processes))  # two batches over all workers
        processes = None
        if workers.processes:
            processes = grain.MultiprocessingOptions(num_workers=workers.processes, per_worker_buffer_size=1)
        self._iterator = grain.experimental.ElasticIterator(
            examples,
            global_batch_size // self._parts,
            grain.sharding.ShardOptions(shard_index=host.index, shard_count=host.count),
            read_options=grain.ReadOptions(
                num_threads=workers.threads, prefetch_buffer_size=max(workers.threads, ahead)
            ),
            multiprocessing_options=processes,
        )
        if position:
            self._iterator.set_state({"global_next_index": position})
        # Grain starts the processes for the first batch. On Ctrl-C this process saves first, and then ends them.
        self._starting = ignoring_interrupts if workers.processes else contextlib.nullcontext

    @property
    def position(self) -> int:
        """The number of examples that all hosts have drawn so far."""
        return self._iterator.get_state()["global_next_index"]

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            with self._starting():
                parts = [next(self._iterator)]
            self._starting = contextlib.nullcontext
            parts += [next(self._iterator) for _ in range(self._parts - 1)]
        except InputError:
            raise
        except Exception as error:  # a worker was killed or has failed: Grain raises its own kinds
            reason = one_line(error, longest=500)
            kind = "" if isinstance(error, ShardError) else f"{type(error).__name__}: "
            raise InputError(kind + reason) from error
        return (
            parts[0]
            if self._parts == 1
            else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        )

    def close(self) -> None:
        """Ends the worker processes, which otherwise outlive this one."""
        self._iterator.close()


def _largest_divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)


def order(mixture: Mixture, seed: int) -> grain.MapDataset:
    """Returns an endless data set of pair indices: each epoch of a source has a new order.

    The mixture's proportions, if it has any, decide which source each draw comes from.
    """
    if mixture.schedule is None:
        return shuffled(len(mixture), seed)
    # Grain's second epoch of a seed is the first epoch of the next seed, so consecutive seeds would share orders.
    seeds = np.random.SeedSequence(seed).generate_state(len(mixture.sources)).tolist()
    orders = [shuffled(*arguments) for arguments in zip(map(len, mixture.sources), seeds, strict=True)]
    return grain.MapDataset.range(sys.maxsize).seed(seed).map(_MixedOrder(mixture, orders))


def shuffled(size: int, seed: int) -> grain.MapDataset:
    """Returns an endless data set of the numbers below ``size``, each once per epoch."""
    # Grain derives a seed for each step of the chain, so order and transform get distinct ones.
    if size - 1 not in BROKEN_MAX_INDICES:
        return grain.MapDataset.range(size).seed(seed).shuffle().repeat()
    one_more = grain.MapDataset.range(size + 1).seed(seed).shuffle().repeat()
    return grain.MapDataset.range(sys.maxsize).seed(seed).map(_WithoutLast(size, one_more))


@dataclasses.dataclass(frozen=True)
class _WithoutLast:
    """Makes a permutation of the numbers below ``size`` from one with one more number."""

    size: int
    one_more: grain.MapDataset

    def __call__(self, position: int) -> int:
        epoch, index = divmod(position, self.size)
        number = self.one_more[epoch * (self.size + 1) + index]
        return number if number < self.size else self.one_more[epoch * (self.size + 1) + self.size]


@dataclasses.dataclass(frozen=True)
class _MixedOrder:
    mixture: Mixture
    orders: list[grain.MapDataset]

    def __call__(self, position: int) -> int:
        source, draw = self.mixture.schedule.draw(position)
        return self.mixture.firsts[source] + self.orders[source][draw]


def _parse_absl_flags() -> None:
    # Grain's workers read absl's flags, and fail if these are not parsed, as in a notebook.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
