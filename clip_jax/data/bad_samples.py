"""What happens to samples that cannot be used: counted by reason, listed by name, and too many of them end the run."""

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clip_jax.errors import FailedError
from clip_jax.json_lines import open_to_append

# In this order, since an example carries a reason's place here. Append; a new order would be another transform.
REASONS = (
    "undecodable",
    "too_large",
    "too_small",
    "extreme_aspect_ratio",
    "empty_caption",
    "no_picture",
    "duplicate_key",
    "unsafe_name",
    "truncated_file",
    "damaged_record",
    "unreadable_file",
)
MOST_LISTED = 10_000
FEWEST_SAMPLES = 1_000  # to judge by


class TooManyBadSamplesError(FailedError):
    """A larger share of the samples is bad than the config allows; one line that says what and where."""


class BadSample(NamedTuple):
    """``index`` in the source, a reason of ``REASONS``, the name of the sample and what exactly is wrong with it."""

    index: int
    reason: str
    name: str
    message: str


class BadSamples:
    """Counts since the program started, of the samples that this host has seen.

    The file lists each bad sample once, up to ten thousand of them, a JSON object a line.
    """

    def __init__(self, file: pathlib.Path):
        self.file = file
        self.counts = np.zeros(len(REASONS), np.int64)
        self.seen = 0
        self._listed = set()
        if file.exists():
            with file.open(encoding="utf-8") as lines:
                for line in lines:
                    try:
                        self._listed.add(json.loads(line)["index"])
                    except (ValueError, KeyError, TypeError):
                        continue  # cut short by a kill
        self._last = ""

    def count(self, reasons: np.ndarray) -> None:
        """Takes one batch's places in ``REASONS``, int8 ``[B]``, -1 where all was well."""
        self.seen += len(reasons)
        self.counts += np.bincount(reasons[reasons >= 0], minlength=len(REASONS))

    def is_new(self, index: int) -> bool:
        return index not in self._listed and len(self._listed) < MOST_LISTED

    def add_to_list(self, samples: Sequence[BadSample]) -> None:
        """Appends those to the file; each in one write, so that a kill cuts one line at most."""
        self._listed.update(sample.index for sample in samples)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open_to_append(self.file) as lines:
            lines.write("".join(json.dumps(sample._asdict()) + "\n" for sample in samples))
        self._last = f"{samples[-1].name}: {samples[-1].message}"

    def check(self, counts: Sequence[int], seen: int, most: float) -> None:
        """Judges sums over all hosts: how often each of ``REASONS``, and how many samples in all.

        Raises:
          TooManyBadSamplesError: more than the share ``most`` of the ``seen`` samples is bad.
        """
        bad = sum(counts)
        if seen < FEWEST_SAMPLES or bad <= most * seen:
            return
        most_first = sorted(zip(counts, REASONS, strict=True), reverse=True)
        by_reason = ", ".join(f"{reason} {count:,}" for count, reason in most_first if count)
        last = f"; the last one: {self._last}" if self._last else ""
        raise TooManyBadSamplesError(
            f"{bad:,} of {seen:,} samples are bad, more than config.data.max_bad_share={most:g} allows ({by_reason}); "
            f"{self.file} lists them{last}"
        )
