"""Stores the index of a data source on disk, such as where each record is. All processes of a machine memory-map it.

An index is a folder of ``.npy`` arrays with a ``meta.json``, by default below ``$XDG_CACHE_HOME/clip_jax/index``.
"""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clip_jax.cache import cache_folder
from clip_jax.files import atomic_path

MOST_OLD = 10  # indices of which parts are copied


class Tables(NamedTuple):
    """The content of an index. ``meta`` can be written as JSON; ``arrays`` have one dimension or more."""

    meta: dict
    arrays: dict[str, np.ndarray]


class MappedIndex:
    """The arrays of an index, memory-mapped: ``arrays`` by name. A pickle holds only the folder's path.

    Raises:
      ValueError: the folder is not a complete index.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        try:
            self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in self.meta["arrays"]}
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} is not an index: {error}") from None

    def __reduce__(self) -> tuple:
        return MappedIndex, (self.folder,)


def open_or_build(kind: str, name: str, content: str, folder: str, build: Callable[[list[MappedIndex]], Tables]):
    """Opens the index of some content, or builds it if it does not exist. An index never changes.

    Args:
      kind: what the index is about, for the folder's name.
      name: a digest of what indices that may share parts have in common, such as the folder of the files.
      content: a digest of all that it depends on.
      folder: folder of all indexes; empty for the default.
      build: computes the tables. It gets the newest indices of the same ``name``, and may copy parts of them.

    Returns:
      The :class:`MappedIndex`.

    Raises:
      ValueError: the folder cannot be written to.
    """
    parent = _parent(folder)
    path = parent / f"{kind}-{name}-{content}"
    try:
        return MappedIndex(path)
    except ValueError:
        pass  # it does not exist, or is damaged
    meta, arrays = build(newest_indices(kind, name, folder))
    try:
        with atomic_path(path) as unfinished:
            unfinished.mkdir(parents=True)
            for key, array in arrays.items():
                np.save(unfinished / f"{key}.npy", array)
            (unfinished / "meta.json").write_text(json.dumps(meta | {"arrays": list(arrays)}), encoding="utf-8")
            _remove_damaged(path)
    except OSError as error:
        with contextlib.suppress(ValueError):
            return MappedIndex(path)  # another process was first, and its tables are the same
        raise ValueError(
            f"an index cannot be written to {parent}: {error.strerror or error}; choose another folder with "
            "?index=FOLDER or XDG_CACHE_HOME"
        ) from None
    return MappedIndex(path)


def _parent(folder: str) -> pathlib.Path:
    return pathlib.Path(folder or cache_folder("index"))


def newest_indices(kind: str, name: str, folder: str) -> list[MappedIndex]:
    """Returns up to ten indices of this kind and name, the newest first; arguments as of :func:`open_or_build`."""
    paths, found = _parent(folder).glob(f"{kind}-{name}-*"), []
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)[:MOST_OLD]:
        with contextlib.suppress(ValueError):
            found.append(MappedIndex(path))
    return found


def _remove_damaged(path: pathlib.Path) -> None:
    """Removes a folder that is not an index, since no folder can be renamed to one that has files."""
    if path.is_dir():
        try:
            MappedIndex(path)
        except ValueError:
            shutil.rmtree(path)
