"""Batches depend only on source, seed and position."""

import io
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.bad_samples import REASONS
from clip_jax.data.decoded_cache import DecodedCache
from clip_jax.data.images import Augmentation
from clip_jax.data.pipeline import Batches, Host, InputError, LoadPair, Transform, Workers, draw_caption
from clip_jax.data.sources import Mixture, Pair, open_source


class Numbered:
    """Images of one color each with their number as caption; some are broken."""

    def __init__(self, broken: Sequence[int] = (), size: int = 11):
        self._broken, self._size = broken, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Pair:
        if index in self._broken:
            return Pair(b"broken", ["broken"], str(index))
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (index % 256, index % 256, index % 256)).save(stream, "PNG")
        return Pair(stream.getvalue(), [f"number {index}"], str(index))


def batches(source=None, cache: int = 0, **arguments) -> Batches:
    mixture = source if isinstance(source, Mixture) else Mixture(["numbers"], [source or Numbered()])
    return Batches(
        LoadPair(mixture, Transform(8, 16, Augmentation()), DecodedCache(cache)),
        **({"global_batch_size": 4, "seed": 3} | arguments),
    )


def take(stream: Batches, count: int) -> list[dict[str, np.ndarray]]:
    taken = [next(stream) for _ in range(count)]
    stream.close()
    return taken


def numbers(taken: list[dict[str, np.ndarray]]) -> list[int]:
    return [int(image[0, 0, 0]) for batch in taken for image in batch["image"]]


def assert_equal(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> None:
    for left, right in zip(one, other, strict=True):
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])


def test_an_epoch_holds_each_pair_once_and_the_next_has_another_order():
    drawn = numbers(take(batches(), 6))
    first, second = drawn[:11], drawn[11:22]
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second
    assert first != list(range(11))


def test_batches_have_the_documented_shapes_and_dtypes():
    [batch] = take(batches(), 1)
    assert batch["image"].shape == (4, 8, 8, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["tokens"].shape == (4, 16)
    assert batch["tokens"].dtype == np.int32


def test_an_example_states_which_source_it_is_from():
    load = LoadPair(Mixture(["a", "b"], [Numbered(), Numbered()]), Transform(8, 16, Augmentation()))
    assert [load(index, np.random.default_rng(0))["source"] for index in (0, 10, 11, 21)] == [0, 0, 1, 1]


def test_another_seed_gives_another_order():
    assert numbers(take(batches(), 2)) != numbers(take(batches(seed=4), 2))


class Counted(Numbered):
    """Counts how often records are read."""

    def __init__(self, broken: tuple[int, ...] = ()):
        super().__init__(broken)
        self.reads = []

    def __getitem__(self, index: int) -> Pair:
        self.reads.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("broken", [(), (5, 6)])
def test_a_cache_does_not_change_batches_and_reads_each_good_record_once(broken):
    source = Counted(broken)
    assert_equal(take(batches(Numbered(broken)), 8), take(batches(source, cache=1), 8))
    good = [index for index in source.reads if index not in broken]
    assert sorted(good) == sorted(set(range(11)) - set(broken))


def test_a_cache_has_a_size_limit_and_its_copy_is_empty():
    cache, pixels = DecodedCache(1), np.zeros((256, 512, 3), np.uint8)
    for index in range(4):
        cache.add(index, Pair(b"bytes", ["caption"], str(index)), pixels, (512, 256))
    kept = [index for index in range(4) if cache.get(index)]
    assert kept == [0, 1]  # two of 384 KiB
    pair, decoded, size = cache.get(1)
    assert (pair.image, pair.captions, size) == (b"", ["caption"], (512, 256)) and decoded is pixels
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.get(0) is None
    copy.add(0, pair, pixels, size)
    assert copy.get(0)
    empty = DecodedCache(0)
    empty.add(0, pair, pixels, size)
    assert empty.get(0) is None


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_do_not_change_the_batches(num_workers):
    source = open_source("emoji:noto/held_out")  # it can be pickled, as workers need
    assert_equal(take(batches(source), 3), take(batches(source, workers=Workers(num_workers)), 3))


def test_the_position_restores_the_stream():
    whole = take(batches(), 7)
    stream = batches()
    for _ in range(3):
        next(stream)
    position = stream.position
    stream.close()
    assert position == 12
    assert_equal(whole[3:], take(batches(position=position), 4))


def test_hosts_share_each_global_batch_and_the_position_of_any_restores_all():
    alone = take(batches(), 3)
    hosts = [take(batches(host=Host(host, 2)), 3) for host in range(2)]
    for step, batch in enumerate(alone):
        assert sorted(numbers([batch])) == sorted(numbers([host[step] for host in hosts]))
    assert numbers(take(batches(position=4), 1)) == numbers([alone[1]])
    joined = numbers([take(batches(host=Host(host, 2), position=4), 1)[0] for host in range(2)])
    assert sorted(joined) == sorted(numbers([alone[1]]))


def test_the_next_pair_replaces_a_broken_image_which_is_reported():
    taken = take(batches(Numbered(broken=(5, 6))), 3)
    drawn = numbers(taken)[:11]
    assert sorted(drawn) == sorted([*range(5), 7, 7, *range(7, 11)])
    reported = [index for batch in taken for index in batch["bad"] if index >= 0]
    assert set(reported) == {5, 6}
    reasons = [REASONS[reason] for batch in taken for reason in batch["bad_reason"] if reason >= 0]
    assert reasons == ["undecodable"] * len(reported)


def test_a_block_of_damaged_records_is_replaced_beyond_it_and_counted():
    source = Numbered(broken=range(300), size=1_000)
    load = LoadPair(Mixture(["numbers"], [source]), Transform(8, 16, Augmentation()))
    for index in (0, 150, 299):
        example = load(index, np.random.default_rng(0))
        assert example["bad"] == index and REASONS[example["bad_reason"]] == "undecodable"
        assert example["image"].any()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_source_of_only_broken_images_is_an_error(num_workers):
    stream = batches(Numbered(broken=tuple(range(11))), workers=Workers(num_workers))
    with pytest.raises(
        InputError, match=r"record \d+ is bad, and so are the 10 records that were tried in its place: "
    ):
        take(stream, 1)
    stream.close()


@pytest.mark.parametrize(
    ("proportions", "drawn", "caption"),
    [([0, 1], 0.0, "b"), ([1, 0], 0.999, "a"), ([1, 1], 0.5, "b"), ([3, 1], 0.7, "a")],
)
def test_a_caption_is_drawn_by_its_proportion_and_never_if_that_is_0(proportions, drawn, caption):
    class Drawn:
        def random(self) -> float:
            return drawn

    assert draw_caption(Pair(b"", ["a", "b"], "", proportions=proportions), Drawn()) == caption


def test_each_visit_draws_one_of_the_captions():
    source = open_source("emoji:noto/held_out")
    tokens = {tuple(row) for batch in take(batches(source, global_batch_size=205), 4) for row in batch["tokens"]}
    captions = {caption for index in range(len(source)) for caption in source[index].captions}
    assert 205 < len(tokens) <= len(captions)
