"""The stream of training batches: a global shuffle, one transform, and a position that is one number.

Everything up to batching is random access, so batch ``k`` is a function of (source, seed, k) alone: the same for any
number of hosts, workers and threads, and after any interruption.
"""

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import grain
import numpy as np

from clip_jax.data.images import Augmentation, ImageError, decode_image, training_transform
from clip_jax.data.sources import PairError, Source
from clip_jax.data.tokenizer import tokenize

# Raise this whenever the same pictures would come out as other pixels or tokens: a run then refuses to resume.
TRANSFORM_VERSION = 1
MAX_NEIGHBOURS = 100


class UndecodableError(ValueError):
    """More broken pictures in a row than chance explains."""


@dataclasses.dataclass(frozen=True)
class LoadPair:
    """Turns a record's index into one training example; never fails on a single broken picture.

    A picture that cannot be decoded is replaced by the next record that can, which keeps every count exact; the
    broken record's index is reported beside the example.
    """

    source: Source
    image_size: int
    context_length: int
    augmentation: Augmentation

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        # Unpickling is the one moment that a worker process gives us before it starts to read.
        if parent := multiprocessing.parent_process():
            # On Ctrl-C the training process saves first and ends its workers then.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            threading.Thread(target=_end_with, args=(parent,), daemon=True).start()

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns ``image`` uint8 ``[S, S, 3]``, ``tokens`` int32 ``[L]``, ``broken`` int64: an index, or -1.

        Also ``seed`` uint32, for whatever the step draws for this pair at this visit.

        Raises:
          UndecodableError: the record and its next hundred neighbours are all broken.
        """
        for neighbour in range(min(MAX_NEIGHBOURS, len(self.source))):
            try:
                pair = self.source[(index + neighbour) % len(self.source)]
                image = decode_image(pair.image)
            except (ImageError, PairError):
                continue
            caption = pair.captions[rng.integers(len(pair.captions))]
            return {
                "image": training_transform(image, self.image_size, rng, self.augmentation),
                "tokens": tokenize(caption, self.context_length, truncate=True)[0],
                "broken": np.int64(index if neighbour else -1),
                "seed": rng.integers(2**32, dtype=np.uint32),  # drawn last: the others are as without it
            }
        raise UndecodableError(f"{neighbour + 1} pictures in a row cannot be decoded, from record {index} on")


def _end_with(parent) -> None:
    """Keeps a worker from outliving a training process that was killed and could not close it."""
    parent.join()
    os._exit(1)


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
        num_threads: int = 2,
        position: int = 0,
    ):
        _parse_absl_flags()
        # Distinct seeds for order and transform come from one: grain derives each by the place in this chain.
        examples = grain.MapDataset.range(len(load_pair.source)).seed(seed).shuffle().repeat().random_map(load_pair)
        processes = None
        if num_workers:
            processes = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        self._iterator = grain.experimental.ElasticIterator(
            examples,
            global_batch_size,
            grain.sharding.ShardOptions(shard_index=host, shard_count=hosts),
            # Two batches' worth ahead over all workers, and no more: an example is some 10 kB to 450 kB.
            read_options=grain.ReadOptions(
                num_threads=num_threads,
                prefetch_buffer_size=2 * global_batch_size // hosts // max(1, num_workers),
            ),
            multiprocessing_options=processes,
        )
        if position:
            self._iterator.set_state({"global_next_index": position})

    @property
    def position(self) -> int:
        return self._iterator.get_state()["global_next_index"]

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def close(self) -> None:
        """Ends the worker processes, which otherwise outlive this one."""
        self._iterator.close()


def _parse_absl_flags() -> None:
    # Grain's workers read absl's flags and fail where nobody has parsed them, as in a notebook.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
