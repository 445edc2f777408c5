"""Tables about a source that are too large for each process to hold: built once, in a folder, and mapped from there.

Each is a folder of ``.npy`` arrays with a ``meta.json``, below ``$XDG_CACHE_HOME/clip_jax/index`` if no other place is
named. All processes of a machine that map it share its pages.
"""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clip_jax.cache import cache_folder
from clip_jax.files import whole


class Tables(NamedTuple):
    """``meta`` can be written as JSON; ``arrays`` have one dimension or more."""

    meta: dict
    arrays: dict[str, np.ndarray]


class MappedIndex:
    """Arrays of a folder, mapped, as ``arrays`` by name; pickled as the folder's path alone.

    Raises:
      ValueError: the folder does not hold what it should.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        try:
            self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in self.meta["arrays"]}
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} holds no index: {error}") from None

    def __reduce__(self) -> tuple:
        return MappedIndex, (self.folder,)


def open_or_build(kind: str, name: str, content: str, folder: str, build: Callable[[MappedIndex | None], Tables]):
    """The tables of this content: those that are there, or new ones. What a folder holds never changes.

    Args:
      kind: what the tables are about, for the folder's name.
      name: a digest of what they are made of, whatever it may hold now.
      content: a digest of all that they depend on.
      folder: where tables are kept; empty for the default.
      build: makes them, and may take over parts of the newest of the same name, if there are any.

    Returns:
      The :class:`MappedIndex`.

    Raises:
      ValueError: the folder cannot be written to.
    """
    parent = pathlib.Path(folder or cache_folder("index"))
    place = parent / f"{kind}-{name}-{content}"
    try:
        return MappedIndex(place)
    except ValueError:
        pass  # not there, or damaged
    meta, arrays = build(_newest(parent, f"{kind}-{name}-"))
    try:
        with whole(place) as unfinished:
            unfinished.mkdir(parents=True)
            for key, array in arrays.items():
                np.save(unfinished / f"{key}.npy", array)
            (unfinished / "meta.json").write_text(json.dumps(meta | {"arrays": list(arrays)}), encoding="utf-8")
            _remove_damaged(place)
    except OSError as error:
        with contextlib.suppress(ValueError):
            return MappedIndex(place)  # another process was first, and its tables are the same
        raise ValueError(
            f"an index cannot be written to {parent}: {error.strerror or error}; name another folder with "
            "?index=FOLDER or XDG_CACHE_HOME"
        ) from None
    return MappedIndex(place)


def _newest(parent: pathlib.Path, prefix: str) -> MappedIndex | None:
    for place in sorted(parent.glob(f"{prefix}*"), key=lambda place: place.stat().st_mtime, reverse=True):
        with contextlib.suppress(ValueError):
            return MappedIndex(place)
    return None


def _remove_damaged(place: pathlib.Path) -> None:
    """Removes a folder that is no index and so of no use to anyone: a folder cannot be renamed onto one with files."""
    if place.is_dir():
        try:
            MappedIndex(place)
        except ValueError:
            shutil.rmtree(place)
