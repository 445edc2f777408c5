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
from clip_jax.data.sources import MissingPackageError, Pair, PairError, Source, open_source
from clip_jax.models.preprocessing import OPENAI_PREPROCESSING, Preprocessing

KEPT_BYTES = 2**29  # of decoded pictures, so that an evaluation during training decodes a small set once


class Said(NamedTuple):
    """What a source says of an image: its classes, none if it has none, and its captions.

    ``image`` is the path of its file where a source names files, so that two records of one file can be recognized;
    else it is empty.
    """

    labels: list[str]
    captions: list[str]
    image: str = ""


class Pictures(Sequence):
    """All pictures of a source by index, uint8 ``[S, S, 3]``; decoded once where all take little memory.

    Nothing takes the place of a picture that cannot be read: the result would be another. Raises ValueError then, one
    line that names it, or OSError where what holds it is lost.
    """

    def __init__(self, name: str, source: Source, image_size: int, preprocessing: Preprocessing = OPENAI_PREPROCESSING):
        self._name, self._source, self._image_size, self._preprocessing = name, source, image_size, preprocessing
        self._rows: Sequence[int] = range(len(source))
        self._change: Callable[[np.ndarray, int], np.ndarray] | None = None
        self._kept: dict[int, np.ndarray] | None = {} if len(source) * image_size**2 * 3 <= KEPT_BYTES else None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def like(self) -> np.ndarray:
        """An empty picture."""
        return np.zeros((self._image_size, self._image_size, 3), np.uint8)

    def __getitem__(self, index: int) -> np.ndarray:
        row = self._rows[index]
        if self._kept is None:
            picture = self._read(row)
        else:
            if row not in self._kept:
                self._kept[row] = self._read(row)
            picture = self._kept[row]
        return self._change(picture, index) if self._change else picture

    def forget(self) -> None:
        """Frees what was decoded."""
        if self._kept is not None:
            self._kept.clear()

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
            return evaluation_transform(decode_image(pair.image), self._image_size, self._preprocessing)
        except PairError as error:
            raise ValueError(f"{self._name}: {error}") from None
        except ImageError as error:
            raise ValueError(f"{self._name}: {key}: {error}") from None


def open_on_all_hosts(name: str) -> Source:
    """Opens a source where every host can, and fails on all where one cannot: the others would wait for it.

    Raises:
      FileNotFoundError: the data, or what reads it, is not there.
      ValueError: it is not as it should be, or not the same on all hosts.
    """
    source, problem = None, ("", "")
    try:
        source = open_source(name)
    except (FileNotFoundError, MissingPackageError) as error:
        problem = ("missing", str(error))
    except (ValueError, OSError) as error:
        problem = ("broken", str(error))
    outcomes = all_gather_objects((*problem, len(source) if source is not None else 0))
    for host, (kind, message, _) in enumerate(outcomes):
        if kind:
            where = f" (host {host})" if len(outcomes) > 1 else ""
            raise (FileNotFoundError if kind == "missing" else ValueError)(message + where)
    if len(set(outcomes)) > 1:
        raise ValueError(f"{name} has {' and '.join(f'{count:,}' for _, _, count in outcomes)} pictures on the hosts")
    return source


def read_said(name: str, source: Source) -> list[Said]:
    """Classes and captions of all records, in their order; every host reads a part and gets all.

    Raises:
      ValueError: a record cannot be read, on any host; one line.
    """
    hosts, host = jax.process_count(), jax.process_index()
    rows = range(len(source) * host // hosts, len(source) * (host + 1) // hosts)
    said = getattr(source, "metadata", None)  # of a source that need not read the image for it

    def read(index: int) -> Said:
        label, captions, image = said(index) if said else _label_and_captions(source[index])
        return Said([one for one in label.split("\n") if one], list(captions), image)

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            part: list[Said] | str = list(pool.map(read, rows))
    except (PairError, OSError) as error:
        part = f"{name}: {error}"
    parts = all_gather_objects(part)
    raise_first([part for part in parts if isinstance(part, str)])
    return [one for part in parts for one in part]


def _label_and_captions(pair: Pair) -> tuple[str, Sequence[str], str]:
    return pair.label, pair.captions, ""


def raise_first(problems: Sequence[str]) -> None:
    """Raises ValueError with the first of the problems that hosts have told each other, if there is one."""
    if problems:
        raise ValueError(problems[0])


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
