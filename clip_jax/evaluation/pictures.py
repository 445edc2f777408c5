"""The pictures of an evaluation and what is said of them, each host reading its share."""

import copy
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.data.images import ImageError, decode_image, evaluation_transform
from clip_jax.data.sources import PairError, Source

KEPT_BYTES = 2**29  # of decoded pictures, so that an evaluation during training decodes a small set once


class Said(NamedTuple):
    """What a source says of a picture: its classes, none if it has none, and its captions."""

    labels: list[str]
    captions: list[str]


class Pictures(Sequence):
    """All pictures of a source by index, uint8 ``[S, S, 3]``; decoded once where all take little memory.

    Nothing takes the place of a picture that cannot be read: the result would be another. Raises ValueError then, one
    line that names it.
    """

    def __init__(self, name: str, source: Source, image_size: int):
        self._name, self._source, self._image_size = name, source, image_size
        self._rows: Sequence[int] = range(len(source))
        self._change: Callable[[np.ndarray, int], np.ndarray] | None = None
        self._kept: dict[int, np.ndarray] | None = {} if len(source) * image_size**2 * 3 <= KEPT_BYTES else None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> np.ndarray:
        row = self._rows[index]
        if self._kept is None:
            picture = self._read(row)
        else:
            if row not in self._kept:
                self._kept[row] = self._read(row)
            picture = self._kept[row]
        return self._change(picture, index) if self._change else picture

    def chosen(self, rows: Sequence[int]) -> "Pictures":
        """Those of these records of the source, in this order."""
        result = copy.copy(self)
        result._rows = rows
        return result

    def changed(self, change: Callable[[np.ndarray, int], np.ndarray]) -> "Pictures":
        """The same pictures, each as ``change(picture, index)`` makes it."""
        result = copy.copy(self)
        result._change = change
        return result

    def _read(self, index: int) -> np.ndarray:
        key = f"record {index}"
        try:
            pair = self._source[index]
            key = pair.key
            return evaluation_transform(decode_image(pair.image), self._image_size)
        except PairError as error:
            raise ValueError(f"{self._name}: {error}") from None
        except ImageError as error:
            raise ValueError(f"{self._name}: {key}: {error}") from None


def read_said(name: str, source: Source) -> list[Said]:
    """Classes and captions of all records, in their order; every host reads a part and gets all.

    Raises:
      ValueError: a record cannot be read, on any host; one line.
    """
    hosts, host = jax.process_count(), jax.process_index()
    rows = range(len(source) * host // hosts, len(source) * (host + 1) // hosts)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            part: list[Said] | str = list(pool.map(lambda index: _said(source[index]), rows))
    except PairError as error:
        part = f"{name}: {error}"
    parts = all_gather_objects(part)
    problems = [part for part in parts if isinstance(part, str)]
    if problems:
        raise ValueError(problems[0])
    return [said for part in parts for said in part]


def _said(pair) -> Said:
    return Said([label for label in pair.label.split("\n") if label], list(pair.captions))


def all_gather_objects(value: object) -> list:
    """Every host's value, in the order of the hosts, on every host."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))  # [hosts]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)]
