"""The option ``skip=FILE`` of sources with shards: a list of shards of which nothing is used.

The records of these shards keep their numbers and are replaced as bad samples are, so a run may change the list at each
start and still resumes at the exact sample.
"""

import difflib
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clip_jax.data.sources.base import PairError
from clip_jax.data.sources.buckets import is_remote
from clip_jax.data.sources.files import read_whole

NOTHING = ""  # no file


class Skipped(NamedTuple):
    """The shards of a source that are skipped: ``shards`` are their indices in the source's list of files."""

    file: str = NOTHING
    shards: frozenset[int] = frozenset()

    def check(self, shard: int, path: str) -> None:
        """Raises PairError if this shard is skipped."""
        if shard in self.shards:
            raise PairError(f"{path} is skipped by {self.file}", "skipped_shard")

    def notes(self, counts: Sequence[int] | np.ndarray) -> list[str]:
        """Returns a note with the number of skipped shards and records; ``counts`` has the records of each shard."""
        if not self.file:
            return []
        records = sum(int(counts[shard]) for shard in self.shards)
        return [f"skipped by {self.file}: {len(self.shards):,} of {len(counts):,} shards, {records:,} records"]


def read_skipped(file: str, paths: Sequence[str]) -> Skipped:
    """Reads a list of shards: one path, or name without folders, per line; what follows a ``#`` is a comment.

    Args:
      file: the list; empty for none.
      paths: all shards of the source.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no UTF-8, a line matches no shard, or all shards are skipped; one line.
    """
    if not file:
        return Skipped()
    try:
        lines = read_whole(file).decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8; it must be a list of shards, one per line") from None
    names = {name for line in lines if (name := line.partition("#")[0].strip())}
    known: dict[str, list[int]] = {}
    for index, path in enumerate(paths):
        whole = path if is_remote(path) else os.path.abspath(path)
        for name in {path, whole, os.path.basename(path)}:
            known.setdefault(name, []).append(index)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ValueError(f"{file}: there is no shard {name}; did you mean {near[0]}?")
    shards = frozenset(index for name in names for index in known[name])
    if len(shards) == len(paths):
        raise ValueError(f"{file} lists all shards of the source, so there is nothing to train on")
    return Skipped(file, shards)
