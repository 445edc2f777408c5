"""Counts unusable samples by reason, lists them in a file, and ends the run if there are too many."""

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clip_jax.errors import FailedError
from clip_jax.json_lines import open_to_append, read_objects

# Examples store the index of a reason. Only append: another order would change what the indices mean.
REASONS = (
    "undecodable",
    "too_large",
    "too_small",
    "extreme_aspect_ratio",
    "empty_caption",
    "no_image",
    "duplicate_key",
    "unsafe_name",
    "truncated_file",
    "damaged_record",
    "unreadable_file",
    "skipped_shard",
)
MAX_LISTED = 10_000
MIN_SAMPLES = 1_000  # before the share of bad samples is checked


class TooManyBadSamplesError(FailedError):
    """The share of bad samples is larger than the config allows."""


class BadSample(NamedTuple):
    """A sample that cannot be used: its index in the source, one of ``REASONS``, its name, and the error message."""

    index: int
    reason: str
    name: str
    message: str


class BadSamples:
    """Counts the bad samples among those that this host has read since the program started.

    The file lists each bad sample once, up to ten thousand of them, one JSON object per line.
    """

    def __init__(self, file: pathlib.Path):
        self.file = file
        self.counts = np.zeros(len(REASONS), np.int64)
        self.seen = 0
        self._listed = set()
        if file.exists():
            listed = (found["index"] for found in read_objects(file.read_bytes()) if found and "index" in found)
            self._listed.update(index for index in listed if isinstance(index, int))
        self._last = ""

    def count(self, reasons: np.ndarray) -> None:
        """Counts one batch. ``reasons`` int8 ``[B]`` are indices of ``REASONS``, or -1 for a good sample."""
        self.seen += len(reasons)
        self.counts += np.bincount(reasons[reasons >= 0], minlength=len(REASONS))

    def is_new(self, index: int) -> bool:
        """Whether the sample at this index is to be listed: it is not listed yet, and the list is not full."""
        return index not in self._listed and len(self._listed) < MAX_LISTED

    def add_to_list(self, samples: Sequence[BadSample]) -> None:
        """Appends samples to the file in one write, so that a kill cuts at most one line."""
        self._listed.update(sample.index for sample in samples)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open_to_append(self.file) as lines:
            lines.write("".join(json.dumps(sample._asdict()) + "\n" for sample in samples))
        self._last = f"{samples[-1].name}: {samples[-1].message}"

    def check(self, counts: Sequence[int], seen: int, most: float) -> None:
        """Checks the counts of all hosts together.

        Args:
          counts: number of bad samples for each of ``REASONS``.
          seen: number of all samples.
          most: largest allowed share of bad samples.

        Raises:
          TooManyBadSamplesError: a larger share is bad.
        """
        # What the user skips is no sign of bad data.
        counts = [0 if reason == "skipped_shard" else n for n, reason in zip(counts, REASONS, strict=True)]
        bad = sum(counts)
        if seen < MIN_SAMPLES or bad <= most * seen:
            return
        most_first = sorted(zip(counts, REASONS, strict=True), reverse=True)
        by_reason = ", ".join(f"{reason} {count:,}" for count, reason in most_first if count)
        last = f"; the last one: {self._last}" if self._last else ""
        raise TooManyBadSamplesError(
            f"{bad:,} of {seen:,} samples are bad, more than config.data.max_bad_share={most:g} allows ({by_reason}); "
            f"{self.file} lists them{last}"
        )
