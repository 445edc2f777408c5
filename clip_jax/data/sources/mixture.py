"""Joins several sources into one, and decides which source each pair is drawn from, by given proportions."""

import bisect
import fractions
import math
from collections.abc import Iterator, Sequence

import numpy as np

from clip_jax.data.sources.base import Pair, Source
from clip_jax.data.sources.digest import digest

MAX_PERIOD = 100_000  # draws
ADJACENT, SPREAD = 100, 100  # pairs that are tried in place of a bad one
GOLDEN_RATIO = 0.6180339887498949  # its multiples, modulo 1, are spread evenly


class Schedule:
    """Decides which source each draw comes from.

    The proportions are exact over every period. After the first t draws of a period, a source has been drawn t times
    its share, plus or minus less than one (R. Tijdeman, The chairman assignment problem, 1980).

    Args:
      proportions: one for each source.

    Raises:
      ValueError: a proportion is not above 0, or the period would be more than 100,000 draws.
    """

    def __init__(self, proportions: Sequence[fractions.Fraction]):
        if min(proportions) <= 0:
            raise ValueError("each must be above 0")
        scale = math.lcm(*(proportion.denominator for proportion in proportions))
        counts = [int(proportion * scale) for proportion in proportions]
        counts = [count // math.gcd(*counts) for count in counts]
        self.counts, self.period = counts, sum(counts)
        if self.period > MAX_PERIOD:
            raise ValueError(
                f"{':'.join(map(str, counts))} repeats after {self.period:,} draws, more than {MAX_PERIOD:,}; round it"
            )
        self._sources = np.zeros(self.period, np.int32)
        self._ranks = np.zeros(self.period, np.int64)  # how often its source was drawn before in the period
        drawn, slack = [0] * len(counts), max(1, 2 * len(counts) - 2)
        for draw in range(self.period):
            # How far each source is behind, in units of 1 / period. Of those that may be drawn, the most urgent is.
            behind = [count * (draw + 1) - self.period * before for count, before in zip(counts, drawn, strict=True)]
            allowed = [source for source, by in enumerate(behind) if by * slack >= self.period]
            source = min(
                allowed,
                key=lambda source: fractions.Fraction(
                    self.period * (slack - 1) - slack * behind[source], slack * counts[source]
                ),
            )
            self._sources[draw], self._ranks[draw] = source, drawn[source]
            drawn[source] += 1

    def draw(self, position: int) -> tuple[int, int]:
        """Returns the source of the draw at this position, and how often that source was drawn before."""
        periods, draw = divmod(position, self.period)
        source = int(self._sources[draw])
        return source, periods * self.counts[source] + int(self._ranks[draw])

    def drawn(self, position: int) -> list[int]:
        """Returns how often each source was drawn before this position."""
        periods, rest = divmod(position, self.period)
        within = np.bincount(self._sources[:rest], minlength=len(self.counts))
        return [periods * count + int(extra) for count, extra in zip(self.counts, within, strict=True)]


class Mixture:
    """Several sources, one after the other. ``schedule`` is None if every pair is drawn equally often.

    Args:
      names: of the sources, for messages and metrics.
      sources: the sources.
      proportions: how often each source is drawn, such as ``3:1``; empty: every pair equally often.

    Raises:
      ValueError: a source is empty, or ``proportions`` is not one number above 0 for each source.
    """

    def __init__(self, names: list[str], sources: list[Source], proportions: str = ""):
        self.names, self.sources = names, sources
        empty = [name for name, source in zip(names, sources, strict=True) if not len(source)]
        if empty:
            raise ValueError(f"{empty[0]} has no pairs")
        self.firsts = np.concatenate([[0], np.cumsum([len(source) for source in sources])]).tolist()
        self.schedule = None
        if proportions:
            parts = proportions.split(":")
            if len(parts) != len(sources):
                given = f"config.data.weights={proportions} has {len(parts)} numbers for {len(sources)} sources"
                raise ValueError(f"{given}: write one for each, such as 3:1 or 0.7:0.3")
            try:
                self.schedule = Schedule([fractions.Fraction(part) for part in parts])
            except (ValueError, ZeroDivisionError) as error:
                raise ValueError(f"config.data.weights={proportions}: {error}") from None
        if len(sources) == 1:
            self.schedule = None

    def __len__(self) -> int:
        return self.firsts[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """Returns the index of the source of this pair, and the pair's index in that source."""
        source = bisect.bisect_right(self.firsts, index) - 1
        return source, index - self.firsts[source]

    def __getitem__(self, index: int) -> Pair:
        source, record = self.locate(index)
        return self.sources[source][record]

    def replacements(self, index: int) -> Iterator[int]:
        """Yields the index of the pair, and of those of the same source that may replace it if it is bad.

        First the next hundred pairs, then pairs at doubling distances, which soon leave a damaged shard, then a hundred
        that are spread over the whole source. The source wraps around at its end.
        """
        source, record = self.locate(index)
        size = len(self.sources[source])
        distances = [*range(min(ADJACENT, size))]
        if size > ADJACENT:
            distances += [
                ADJACENT << power for power in range((size // ADJACENT).bit_length()) if ADJACENT << power < size
            ]
            distances += [int(number * size * GOLDEN_RATIO) for number in range(1, SPREAD + 1)]
        for distance in distances:
            yield self.firsts[source] + (record + distance) % size

    def epochs(self, position: int) -> dict[str, float]:
        """Returns the number of epochs of each source, by name, after ``position`` draws."""
        if self.schedule is None:
            return {name: position / len(self) for name in self.names}
        drawn = self.schedule.drawn(position)
        return {name: n / len(source) for name, n, source in zip(self.names, drawn, self.sources, strict=True)}

    def notes(self) -> list[str]:
        """Returns the notes of all sources, with the source's name if there are several."""
        return [
            note if len(self.sources) == 1 else f"{name}: {note}"
            for name, source in zip(self.names, self.sources, strict=True)
            for note in source.notes()
        ]

    def fingerprint(self) -> str:
        """Returns a digest of all sources and proportions; of a single source its own fingerprint."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint()
        counts = self.schedule.counts if self.schedule else None
        return digest([(source.fingerprint(), len(source)) for source in self.sources], counts)
