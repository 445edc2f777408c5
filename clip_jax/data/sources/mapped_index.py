"""Tables about a source that are too large for each process to hold: built once, in a folder, and mapped from there.

Each is a folder of ``.npy`` arrays with a ``meta.json``, below ``$XDG_CACHE_HOME/clip_jax/index`` if no other place is
named. All processes of a machine that map it share its pages.
"""

import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Tables(NamedTuple):
    """``meta`` can be written as JSON; ``arrays`` have one dimension or more."""

    meta: dict
    arrays: dict[str, np.ndarray]


def default_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "clip_jax" / "index"


class MappedIndex:
    """Arrays of a folder as attributes of ``arrays``, mapped; pickled as the folder's path alone.

    Raises:
      ValueError: the folder holds no tables.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        try:
            self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{folder} holds no index: {error}") from None

    def __reduce__(self) -> tuple:
        return MappedIndex, (self.folder,)


def open_or_build(
    name: str, folder: str, is_fresh: Callable[[dict], bool], build: Callable[[MappedIndex | None], Tables]
) -> MappedIndex:
    """The tables of this name if they are fresh, or else new ones.

    Args:
      name: of the folder inside ``folder``: a digest of what the tables depend on.
      folder: where tables are kept; empty for the default.
      is_fresh: whether tables with this ``meta`` can be taken as they are.
      build: makes new ones out of the old, if there are any that can be read.

    Raises:
      OSError: the folder cannot be written to.
    """
    place = pathlib.Path(folder or default_folder()) / name
    old = None
    if place.is_dir():
        try:
            old = MappedIndex(place)
        except ValueError:
            old = None  # damaged: built anew
    if old is not None and is_fresh(old.meta):
        return old
    meta, arrays = build(old)
    unfinished = place.with_name(f"{name}.{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        for key, array in arrays.items():
            np.save(unfinished / f"{key}.npy", array)
        (unfinished / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        _put_in_place(unfinished, place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return MappedIndex(place)


def _put_in_place(new: pathlib.Path, place: pathlib.Path) -> None:
    """A folder can only be renamed onto an empty one; who has mapped the old files keeps them."""
    for _ in range(10):
        try:
            new.rename(place)
            return
        except OSError:
            if not place.is_dir():
                raise
        # Another process may do the same at this moment: whichever is last stays, and both are right.
        aside = place.with_name(f"{place.name}.{uuid.uuid4().hex}")
        try:
            place.rename(aside)
        except FileNotFoundError:
            continue
        shutil.rmtree(aside, ignore_errors=True)
    raise OSError(f"{place} is being written by too many processes at once")
