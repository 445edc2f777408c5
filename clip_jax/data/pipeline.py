"""The stream of training batches: a global shuffle, one transform, and a position that is one number.

Everything up to batching is random access, so batch ``k`` is a function of (source, seed, k) alone: the same for any
number of hosts, workers and threads, and after any interruption.
"""

import dataclasses
import multiprocessing
import signal
import sys
from collections.abc import Iterator

import grain
import numpy as np

from clip_jax.data.bad_samples import REASONS
from clip_jax.data.decoded_cache import DecodedCache
from clip_jax.data.images import (
    DEFAULT_PREPROCESSING,
    Augmentation,
    ImageError,
    decode_for_training,
    decode_pixels,
    training_transform,
)
from clip_jax.data.sources import Mixture, Pair, PairError, ShardError
from clip_jax.data.sources.buckets import current_access, use_access
from clip_jax.data.tokenizer import tokenize
from clip_jax.data.workers import end_with_parent
from clip_jax.models.preprocessing import Preprocessing

# Raise this whenever the same pictures would come out as other pixels or tokens: a run then refuses to resume.
TRANSFORM_VERSION = 3
MAX_NEIGHBOURS = 100
LARGEST_PART = 256  # examples
# Grain's shuffle (0.2.18) is no permutation where the greatest index is one of these: index 0 gets the same place.
UNSHUFFLED = {4**power for power in range(8, 32)}


class InputError(ValueError):
    """The input cannot go on: a shard is lost, a worker has died, or too many samples in a row are bad."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """From an encoded pair to what a tower sees; ``min_side`` px and ``max_aspect_ratio`` tell pictures to replace."""

    image_size: int
    context_length: int
    augmentation: Augmentation
    min_side: int = 1
    max_aspect_ratio: float = 100.0
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING

    def decode(self, pair: Pair) -> tuple[np.ndarray, tuple[int, int]]:
        """The image's pixels, uint8 ``[H, W, 3]``, and its own width and height, which may be larger.

        Raises:
          ImageError: the picture cannot be used.
        """
        limits = (self.min_side, self.max_aspect_ratio)
        return decode_for_training(pair.image, self.image_size, self.augmentation, *limits, self.preprocessing)

    def __call__(
        self, pair: Pair, pixels: np.ndarray, size: tuple[int, int], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """``tokens`` int32 ``[L]`` of one of the captions, and ``image`` uint8 ``[S, S, 3]`` from what was decoded."""
        caption = draw_caption(pair, rng)
        image = training_transform(pixels, self.image_size, rng, self.augmentation, size, self.preprocessing)
        return {"tokens": tokenize(caption, self.context_length, truncate=True)[0], "image": image}

    def check(self, pair: Pair) -> None:
        """Raises ImageError if the picture cannot be used."""
        decode_pixels(pair.image, self.min_side, self.max_aspect_ratio)


@dataclasses.dataclass(frozen=True)
class LoadPair:
    """Turns a pair's index into one training example; never fails on a single bad sample.

    A sample that cannot be used is replaced by the next of its source that can, which keeps every count exact; its
    index and what is wrong with it are reported beside the example.
    """

    mixture: Mixture
    transform: Transform
    cache: DecodedCache = dataclasses.field(default_factory=lambda: DecodedCache(0))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"access": current_access()}

    def __setstate__(self, state: dict) -> None:
        use_access(state.pop("access"))
        self.__dict__.update(state)
        # Unpickling is the one moment that a worker process gives us before it starts to read.
        if multiprocessing.parent_process():
            # On Ctrl-C the training process saves first and ends its workers then.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            end_with_parent()

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns ``image`` uint8 ``[S, S, 3]``, ``tokens`` int32 ``[L]``, and of a sample that was replaced ``bad``
        int64, its index, and ``bad_reason`` int8, its place in ``REASONS``; else both are -1.

        Also ``seed`` uint32, for whatever the step draws for this pair at this visit, and ``source`` int32, the place
        of its source in the mixture.

        Raises:
          InputError: the record and its next hundred neighbours are all bad.
          ShardError: the file that holds it is lost.
        """
        problem, tried = None, 0
        for place in self.mixture.neighbours(index, MAX_NEIGHBOURS):
            try:
                example = self.transform(*self._decoded(place), rng)
            except ShardError:
                raise
            except Exception as error:  # a source and its pictures are whatever somebody has put on the web
                problem, tried = problem or error, tried + 1
                continue
            return example | {
                "bad": np.int64(index if problem else -1),
                "bad_reason": np.int8(REASONS.index(reason_of(problem)) if problem else -1),
                "source": np.int32(self.mixture.locate(index)[0]),
                "seed": rng.integers(2**32, dtype=np.uint32),  # drawn last: the others are as without it
            }
        raise InputError(f"{tried} samples in a row cannot be used, from {index} on; the first: {problem}")

    def _decoded(self, place: int) -> tuple[Pair, np.ndarray, tuple[int, int]]:
        if (kept := self.cache.get(place)) is not None:
            return kept
        pair = self.mixture[place]
        pixels, size = self.transform.decode(pair)
        self.cache.add(place, pair, pixels, size)
        return pair, pixels, size


def reason_of(problem: Exception) -> str:
    """The one of ``REASONS`` that a bad sample's error counts as."""
    return problem.reason if isinstance(problem, ImageError | PairError) else "damaged_record"


def draw_caption(pair: Pair, rng: np.random.Generator) -> str:
    """One of a pair's captions, by their weights if it has any."""
    if not pair.weights:
        return pair.captions[rng.integers(len(pair.captions))]
    ends = np.cumsum(pair.weights)
    return pair.captions[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))]


class Batches(Iterator[dict[str, np.ndarray]]):
    """This host's share of each global batch, forever: ``image`` ``[B, S, S, 3]`` and all that :class:`LoadPair` gives.

    ``position`` is the number of examples that all hosts have drawn so far; set it to resume.
    """

    def __init__(
        self,
        load_pair: LoadPair,
        global_batch_size: int,
        seed: int,
        host: int = 0,
        hosts: int = 1,
        num_workers: int = 0,
        num_threads: int = 1,
        position: int = 0,
    ):
        _parse_absl_flags()
        examples = order(load_pair.mixture, seed).random_map(load_pair)
        local_batch_size, uneven = divmod(global_batch_size, hosts)
        if uneven:
            raise ValueError(f"a global batch of {global_batch_size} cannot be divided among {hosts} hosts")
        # A thread of grain's makes a whole batch, so large ones are made in parts: all threads begin with the first.
        self._parts = local_batch_size // _largest_divisor(local_batch_size, LARGEST_PART)
        ahead = -(-2 * self._parts // max(1, num_workers))  # two batches over all workers
        processes = None
        if num_workers:
            processes = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
        self._iterator = grain.experimental.ElasticIterator(
            examples,
            global_batch_size // self._parts,
            grain.sharding.ShardOptions(shard_index=host, shard_count=hosts),
            read_options=grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(num_threads, ahead)),
            multiprocessing_options=processes,
        )
        if position:
            self._iterator.set_state({"global_next_index": position})

    @property
    def position(self) -> int:
        return self._iterator.get_state()["global_next_index"]

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            parts = [next(self._iterator) for _ in range(self._parts)]
        except InputError:
            raise
        except Exception as error:  # of a worker that was killed, or has failed: grain's own kinds
            reason = " ".join(str(error).split())[:500]
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
    """Indices of pairs, forever: each source's in a new order in each epoch, by the mixture's weights if it has any."""
    if mixture.schedule is None:
        return shuffled(len(mixture), seed)
    # Grain's second epoch of one seed is the first of the next seed, so neighbouring seeds would share orders.
    seeds = np.random.SeedSequence(seed).generate_state(len(mixture.sources)).tolist()
    orders = [shuffled(*arguments) for arguments in zip(map(len, mixture.sources), seeds, strict=True)]
    return grain.MapDataset.range(sys.maxsize).seed(seed).map(_WeightedOrder(mixture, orders))


def shuffled(size: int, seed: int) -> grain.MapDataset:
    """The numbers below ``size``, forever, each once in an epoch."""
    # Distinct seeds for order and transform come from one: grain derives each by the place in the chain.
    if size - 1 not in UNSHUFFLED:
        return grain.MapDataset.range(size).seed(seed).shuffle().repeat()
    one_more = grain.MapDataset.range(size + 1).seed(seed).shuffle().repeat()
    return grain.MapDataset.range(sys.maxsize).seed(seed).map(_WithoutLast(size, one_more))


@dataclasses.dataclass(frozen=True)
class _WithoutLast:
    """A permutation of the numbers below ``size`` out of one that has a number more."""

    size: int
    one_more: grain.MapDataset

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        number = self.one_more[epoch * (self.size + 1) + place]
        return number if number < self.size else self.one_more[epoch * (self.size + 1) + self.size]


@dataclasses.dataclass(frozen=True)
class _WeightedOrder:
    mixture: Mixture
    orders: list[grain.MapDataset]

    def __call__(self, position: int) -> int:
        source, draw = self.mixture.schedule.draw(position)
        return self.mixture.firsts[source] + self.orders[source][draw]


def _parse_absl_flags() -> None:
    # Grain's workers read absl's flags and fail where nobody has parsed them, as in a notebook.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
