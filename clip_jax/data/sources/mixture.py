"""Several sources as one, and how much is drawn of each."""

import bisect
import fractions
import math
from collections.abc import Iterator, Sequence

import numpy as np

from clip_jax.data.sources.base import Pair, Source
from clip_jax.data.sources.digest import digest

LONGEST_PERIOD = 100_000  # draws


class Schedule:
    """Which source each draw goes to: shares that are exact over every period, and all but exact over any window.

    Within the first t draws, and so from any period's start on, source k has been drawn t times its share, give or take
    less than one (R. Tijdeman, The chairman assignment problem, 1980).

    Raises:
      ValueError: a weight is not above 0, or the shares need a period of more than 100,000 draws.
    """

    def __init__(self, weights: Sequence[fractions.Fraction]):
        if min(weights) <= 0:
            raise ValueError("each must be above 0")
        scale = math.lcm(*(weight.denominator for weight in weights))
        counts = [int(weight * scale) for weight in weights]
        counts = [count // math.gcd(*counts) for count in counts]
        self.counts, self.period = counts, sum(counts)
        if self.period > LONGEST_PERIOD:
            raise ValueError(
                f"shares of {':'.join(map(str, counts))} repeat only after {self.period:,} draws; round them"
            )
        self._sources = np.zeros(self.period, np.int32)
        self._ranks = np.zeros(self.period, np.int64)  # how often that source was drawn before in the period
        drawn, slack = [0] * len(counts), max(1, 2 * len(counts) - 2)
        for draw in range(self.period):
            # In units of 1 / period, how far each source is behind; of those that may be drawn, the most urgent.
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
        """The source of the draw at this position, and how often that one was drawn before."""
        periods, draw = divmod(position, self.period)
        source = int(self._sources[draw])
        return source, periods * self.counts[source] + int(self._ranks[draw])

    def drawn(self, position: int) -> list[int]:
        """How often each source was drawn before this position."""
        periods, rest = divmod(position, self.period)
        within = np.bincount(self._sources[:rest], minlength=len(self.counts))
        return [periods * count + int(extra) for count, extra in zip(self.counts, within, strict=True)]


class Mixture:
    """Sources one after the other; ``schedule`` is None where each pair counts alike.

    Raises:
      ValueError: a source is empty, or ``weights`` is not one number above 0 for each.
    """

    def __init__(self, names: list[str], sources: list[Source], weights: str = ""):
        self.names, self.sources = names, sources
        empty = [name for name, source in zip(names, sources, strict=True) if not len(source)]
        if empty:
            raise ValueError(f"{empty[0]} has no pairs")
        self.firsts = np.concatenate([[0], np.cumsum([len(source) for source in sources])]).tolist()
        self.weights, self.schedule = weights, None
        if weights:
            parts = weights.split(":")
            if len(parts) != len(sources):
                raise ValueError(f"weights {weights} are {len(parts)} for {len(sources)} sources: write 3:1 or 0.7:0.3")
            try:
                self.schedule = Schedule([fractions.Fraction(part) for part in parts])
            except (ValueError, ZeroDivisionError) as error:
                raise ValueError(f"weights {weights}: {error}") from None
        if len(sources) == 1:
            self.schedule = None  # all of one source, whatever its weight

    def __len__(self) -> int:
        return self.firsts[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the source that holds this pair, and the pair's index there."""
        source = bisect.bisect_right(self.firsts, index) - 1
        return source, index - self.firsts[source]

    def __getitem__(self, index: int) -> Pair:
        source, place = self.locate(index)
        return self.sources[source][place]

    def neighbors(self, index: int, most: int) -> Iterator[int]:
        """The pair itself and those after it in the same source, whose end is followed by its start."""
        source, place = self.locate(index)
        size = len(self.sources[source])
        for distance in range(min(most, size)):
            yield self.firsts[source] + (place + distance) % size

    def epochs(self, position: int) -> dict[str, float]:
        """How often each source has been gone through after so many draws, by name."""
        if self.schedule is None:
            return {name: position / len(self) for name in self.names}
        drawn = self.schedule.drawn(position)
        return {name: n / len(source) for name, n, source in zip(self.names, drawn, self.sources, strict=True)}

    def notes(self) -> list[str]:
        """Those of all sources, with the source's name where there are several."""
        return [
            note if len(self.sources) == 1 else f"{name}: {note}"
            for name, source in zip(self.names, self.sources, strict=True)
            for note in source.notes()
        ]

    def fingerprint(self) -> str:
        """Of one source alone it is that source's own."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint()
        counts = self.schedule.counts if self.schedule else None
        return digest([(source.fingerprint(), len(source)) for source in self.sources], counts)
