"""Several sources are joined to one, in exact proportions."""

import fractions
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import write_shards

from clip_jax.data.pipeline import order
from clip_jax.data.sources import Pair, open_mixture, open_source
from clip_jax.data.sources.mixture import Mixture, Schedule


class Numbers:
    """A source of pairs without images."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Pair:
        return Pair(b"", [str(index)], str(index))

    def fingerprint(self) -> str:
        return str(self.size)


def mixture_of(*sizes: int, proportions: str = "") -> Mixture:
    return Mixture([f"s{size}" for size in sizes], [Numbers(size) for size in sizes], proportions)


def drawn(mixture: Mixture, positions: range, seed: int = 3) -> list[tuple[int, int]]:
    indices = order(mixture, seed)
    return [mixture.locate(indices[position]) for position in positions]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_every_prefix_has_each_share_to_less_than_one_draw(proportions):
    schedule = Schedule([fractions.Fraction(proportion) for proportion in proportions])
    drawn = np.zeros(len(proportions), int)
    for position in range(2 * schedule.period + 5):
        assert schedule.drawn(position) == drawn.tolist()
        ideal = position * np.array(proportions) / sum(proportions)
        assert np.abs(drawn - ideal).max() < 1
        source, rank = schedule.draw(position)
        assert rank == drawn[source]
        drawn[source] += 1


def test_a_window_of_a_period_is_exact_wherever_it_starts():
    found = [source for source, _ in drawn(mixture_of(50, 7, 90, proportions="0.5:0.3:0.2"), range(200))]
    for start in range(190):
        assert np.bincount(found[start : start + 10], minlength=3).tolist() == [5, 3, 2]


def test_each_source_has_its_own_epochs():
    mixture = mixture_of(5, 20, proportions="1:1")
    found = drawn(mixture, range(80))
    small = [position for source, position in found if source == 0]
    large = [position for source, position in found if source == 1]
    for epoch in range(8):
        assert sorted(small[5 * epoch : 5 * epoch + 5]) == list(range(5))
    assert sorted(large[:20]) == sorted(large[20:]) == list(range(20))
    assert large[:20] != large[20:]
    assert mixture.epochs(80) == {"s5": 8.0, "s20": 2.0}


def test_sources_of_equal_size_have_different_orders():
    found = drawn(mixture_of(30, 30, proportions="1:1"), range(120))
    orders = [[position for source, position in found if source == number] for number in (0, 1)]
    epochs = [tuple(order[start : start + 30]) for order in orders for start in (0, 30)]
    assert len(set(epochs)) == 4


def test_without_proportions_each_pair_comes_once_in_an_epoch_of_all():
    mixture = mixture_of(5, 20)
    found = drawn(mixture, range(50))
    everything = [(0, position) for position in range(5)] + [(1, position) for position in range(20)]
    assert sorted(found[:25]) == sorted(found[25:]) == everything
    assert mixture.epochs(50) == {"s5": 2.0, "s20": 2.0}


@pytest.mark.parametrize("size", [2**32 - 1, 2**32, 2**32 + 1, 3 * 2**32, 2**40 + 12345])
def test_an_epoch_beyond_32_bits_is_a_permutation_of_the_whole_range(size):
    indices = order(mixture_of(size), 3)
    rng = np.random.default_rng(0)
    # Adjacent positions, both ends, and positions with equal lowest 32 bits, which truncation would confuse.
    scattered = rng.integers(0, size, 20_000)
    positions = {*range(20_000), *range(size - 20_000, size), *scattered.tolist(), *(scattered + 2**32).tolist()}
    positions = sorted(position for position in positions if position < size)
    found = np.array([indices[position] for position in positions])
    assert len(set(found.tolist())) == len(positions)
    assert found.min() >= 0 and found.max() < size
    counts, _ = np.histogram([indices[position] for position in range(20_000)], bins=16, range=(0, size))
    assert np.abs(counts - 1_250).max() < 6 * np.sqrt(1_250)


@pytest.mark.parametrize(
    "size",
    [65_536, 65_537, pytest.param(65_538, marks=pytest.mark.slow), pytest.param(262_145, marks=pytest.mark.slow)],
)
def test_every_epoch_is_a_permutation_also_where_grains_shuffle_is_not(size):
    indices = order(mixture_of(size), 3)
    epochs = [[indices[epoch * size + position] for position in range(size)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(size))
    assert epochs[0] != epochs[1]


def test_a_bad_samples_neighbors_stay_in_its_source():
    assert list(mixture_of(3, 4).replacements(5)) == [5, 6, 3, 4]
    assert list(mixture_of(3, 4).replacements(2)) == [2, 0, 1]


@pytest.mark.parametrize("size", [99, 100, 101, 250, 100_000, 10**9])
@pytest.mark.parametrize("damaged", [10_000, 1_000_000])
def test_a_damaged_shard_is_left_after_few_attempts(size, damaged):
    mixture = mixture_of(5, size)
    tried = [index - 5 for index in mixture.replacements(5 + size // 3)]
    assert tried[: min(100, size)] == [(size // 3 + distance) % size for distance in range(min(100, size))]
    assert len(tried) <= 230 and all(0 <= index < size for index in tried)
    if size > 2 * damaged:
        outside = next(n for n, index in enumerate(tried) if not size // 3 <= index < size // 3 + damaged)
        assert outside <= 115


def test_what_may_replace_a_pair_is_spread_over_the_whole_source():
    tried = sorted(index - 5 for index in list(mixture_of(5, 10**6).replacements(5))[-100:])
    assert max(later - earlier for earlier, later in itertools.pairwise(tried)) < 30_000


def test_a_name_joins_sources_and_a_copy_of_them_is_small(tmp_path):
    shards = write_shards(tmp_path, 1, 4)
    mixture = open_mixture(f"emoji:noto/train + {shards}", "3:1")
    assert len(mixture) == len(open_source("emoji:noto/train")) + 4
    assert len(pickle.dumps(mixture)) < 5_000
    assert mixture[len(mixture) - 1].captions == ["number 3"]


def test_the_fingerprint_depends_on_order_and_normalized_proportions():
    prints = [
        mixture_of(*sizes, proportions=proportions).fingerprint()
        for sizes in ((3, 4), (4, 3))
        for proportions in ("", "2:1")
    ]
    assert len(set(prints)) == 4
    assert mixture_of(3, 4, proportions="0.5:0.25").fingerprint() == mixture_of(3, 4, proportions="2:1").fingerprint()
    assert mixture_of(3).fingerprint() == Numbers(3).fingerprint()


@pytest.mark.parametrize(
    ("proportions", "expected"),
    [("1", "has 1 numbers for 2 sources"), ("1:0", "above 0"), ("1:x", "Invalid"), ("1:0.0000001", "round it")],
)
def test_invalid_proportions_are_refused(proportions, expected):
    with pytest.raises(ValueError, match=expected):
        mixture_of(3, 4, proportions=proportions)


def test_an_empty_source_is_refused_by_name():
    with pytest.raises(ValueError, match="s0 has no pairs"):
        mixture_of(3, 0)


def test_draws_of_three_sources_are_evenly_spread():
    found = [source for source, _ in drawn(mixture_of(9, 9, 9, proportions="8:1:1"), range(100))]
    gaps = [len(list(run)) for source, run in itertools.groupby(found) if source == 0]
    assert max(gaps) <= 9
