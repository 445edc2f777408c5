"""Reads the images, labels and captions of an evaluation; each host reads its own share of the records."""

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

CACHE_BYTES = 2**29  # of decoded images, so that evaluations during training decode a small set only once


class Annotation(NamedTuple):
    """The labels and captions of one record; either list may be empty.

    ``image`` is the path of the image file, by which two records of one file are recognized. It is empty if the source
    does not name files.
    """

    labels: list[str]
    captions: list[str]
    image: str = ""


class Images(Sequence):
    """The images of a source by index, uint8 ``[S, S, 3]``. Caches them if all fit into ``CACHE_BYTES``.

    An image that cannot be read is not replaced, since that would change the result. Indexing raises ValueError for it,
    one line with the name of the record, or OSError if the source itself cannot be read.
    """

    def __init__(self, name: str, source: Source, image_size: int, preprocessing: Preprocessing = OPENAI_PREPROCESSING):
        self._name, self._source, self._image_size, self._preprocessing = name, source, image_size, preprocessing
        self._rows: Sequence[int] = range(len(source))
        self._transform: Callable[[np.ndarray, int], np.ndarray] | None = None
        self._cache: dict[int, np.ndarray] | None = {} if len(source) * image_size**2 * 3 <= CACHE_BYTES else None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def blank_image(self) -> np.ndarray:
        """Zeros with the shape and dtype of an image."""
        return np.zeros((self._image_size, self._image_size, 3), np.uint8)

    def __getitem__(self, index: int) -> np.ndarray:
        row = self._rows[index]
        if self._cache is None:
            image = self._read(row)
        else:
            if row not in self._cache:
                self._cache[row] = self._read(row)
            image = self._cache[row]
        return self._transform(image, index) if self._transform else image

    def clear_cache(self) -> None:
        """Frees the memory of the cached images."""
        if self._cache is not None:
            self._cache.clear()

    def select(self, rows: Sequence[int]) -> "Images":
        """Returns the images of these records of the source, in this order. The cache is shared."""
        result = copy.copy(self)
        result._rows = rows
        return result

    def map(self, transform: Callable[[np.ndarray, int], np.ndarray]) -> "Images":
        """Returns the images ``transform(image, index)``."""
        result = copy.copy(self)
        result._transform = transform
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
    """Opens a source on every host. If one host cannot, all raise; otherwise they would wait for it forever.

    Raises:
      FileNotFoundError: the data, or the package that reads it, is missing.
      ValueError: the data is not valid, or differs between hosts.
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
        raise ValueError(f"{name} has {' and '.join(f'{count:,}' for _, _, count in outcomes)} images on the hosts")
    return source


def read_annotations(name: str, source: Source) -> list[Annotation]:
    """Returns the labels and captions of all records, in order. Each host reads a part and gets the whole.

    Raises:
      ValueError: a host cannot read a record; one line.
    """
    hosts, host = jax.process_count(), jax.process_index()
    rows = range(len(source) * host // hosts, len(source) * (host + 1) // hosts)
    metadata = getattr(source, "read_metadata", None)  # reads the annotation without the image, where the source can

    def read(index: int) -> Annotation:
        label, captions, image = metadata(index) if metadata else _label_and_captions(source[index])
        return Annotation([one for one in label.split("\n") if one], list(captions), image)

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            part: list[Annotation] | str = list(pool.map(read, rows))
    except (PairError, OSError) as error:
        part = f"{name}: {error}"
    parts = all_gather_objects(part)
    raise_first([part for part in parts if isinstance(part, str)])
    return [annotation for part in parts for annotation in part]


def _label_and_captions(pair: Pair) -> tuple[str, Sequence[str], str]:
    return pair.label, pair.captions, ""


def raise_first(problems: Sequence[str]) -> None:
    """Raises ValueError with the first of the gathered problems, if there is one."""
    if problems:
        raise ValueError(problems[0])


def all_gather_objects(value: object) -> list:
    """Returns the values of all hosts, in the order of the hosts, on every host."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))  # [hosts]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)]
