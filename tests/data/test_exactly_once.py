"""In every format, an epoch has each pair once, on any number of hosts and workers and after any interruption."""

import csv
import itertools
import json

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from shards import image_bytes, write_shards

from clip_jax.data.images import Augmentation
from clip_jax.data.pipeline import Batches, Host, LoadPair, Transform, Workers
from clip_jax.data.sources import open_mixture
from clip_jax.data.tokenizer import tokenize

PAIRS = 6  # of each source; seven of them make 42


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[str]:
    """One source of each kind. Their pairs are numbered consecutively."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("sources")
    numbers = iter(range(10 * PAIRS))
    names = [write_shards(folder, shards=2, pairs=PAIRS // 2)]
    for _ in range(PAIRS):
        next(numbers)

    def some() -> list[int]:
        return [next(numbers) for _ in range(PAIRS)]

    writer = ArrayRecordWriter(str(folder / "pairs.array_record"), "group_size:1,uncompressed")
    for number in some():
        writer.write(msgpack.packb({"image": image_bytes(number), "captions": [f"number {number}"]}))
    writer.close()
    names.append(f"array_record:{folder}/pairs.array_record")

    rows = [{"image": {"bytes": image_bytes(number)}, "caption": f"number {number}"} for number in some()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "pairs.parquet", row_group_size=4)
    names.append(f"parquet:{folder}/pairs.parquet")

    for kind in ("csv", "tsv", "jsonl"):
        rows = [(f"{number}.png", f"number {number}") for number in some()]
        for name, caption in rows:
            (folder / name).write_bytes(image_bytes(int(caption.split()[1])))
        with open(folder / f"pairs.{kind}", "w", newline="") as file:
            if kind == "jsonl":
                file.writelines(json.dumps({"image": name, "caption": caption}) + "\n" for name, caption in rows)
            else:
                table = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
                table.writerows([("image", "caption"), *rows])
        names.append(f"{kind}:{folder}/pairs.{kind}")

    (folder / "images").mkdir()
    for number in some():
        (folder / "images" / f"{number}.png").write_bytes(image_bytes(number))
        (folder / "images" / f"{number}.txt").write_text(f"number {number}\n")
    return [*names, f"folder:{folder}/images"]


def batches(sources: list[str], proportions: str = "", **arguments) -> Batches:
    load_pair = LoadPair(open_mixture(" + ".join(sources), proportions), Transform(8, 8, Augmentation()))
    return Batches(load_pair, **({"global_batch_size": 12, "seed": 5} | arguments))


def seen(batch: dict[str, np.ndarray]) -> list[int]:
    """Returns the numbers of a batch's pairs, and checks that image and caption belong together."""
    numbers = (batch["image"][:, 0, 0, 0].astype(int) + 256 * batch["image"][:, 0, 0, 1].astype(int)).tolist()
    for number, tokens in zip(numbers, batch["tokens"], strict=True):
        np.testing.assert_array_equal(tokens, tokenize(f"number {number}", 8)[0])
    assert set(batch["bad"].tolist()) == {-1}
    return numbers


def joined(lists) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def take(stream: Batches, count: int) -> list[list[int]]:
    taken = [seen(next(stream)) for _ in range(count)]
    stream.close()
    return taken


@pytest.fixture(scope="module")
def undisturbed(sources) -> list[list[int]]:
    """Fourteen batches of twelve: four epochs of 42."""
    return take(batches(sources), 14)


def test_each_epoch_is_the_multiset_of_all_pairs(undisturbed):
    drawn = joined(undisturbed)
    for epoch in range(4):
        assert sorted(drawn[42 * epoch : 42 * epoch + 42]) == list(range(42))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_draw_the_same_batches(sources, undisturbed, hosts):
    parts = [take(batches(sources, host=Host(host, hosts)), 14) for host in range(hosts)]
    for step, batch in enumerate(undisturbed):
        assert sorted(batch) == sorted(joined(part[step] for part in parts))


def test_four_workers_draw_the_same_batches_in_the_same_order(sources, undisturbed):
    assert take(batches(sources, workers=Workers(4)), 14) == undisturbed


def test_resuming_on_another_number_of_hosts_changes_nothing(sources, undisturbed):
    rng = np.random.default_rng(0)
    step, hosts_of_each, drawn = 0, [], []
    while step < 14:
        hosts, steps = int(rng.choice([1, 2, 3, 4])), int(rng.integers(1, 5))
        steps = min(steps, 14 - step)
        # A killed run has drawn more than it has saved, so it draws some pairs again.
        parts = [take(batches(sources, host=Host(host, hosts), position=12 * step), steps + 1) for host in range(hosts)]
        drawn += [sorted(joined(part[number] for part in parts)) for number in range(steps)]
        step += steps
        hosts_of_each.append(hosts)
    assert len(set(hosts_of_each)) > 2
    assert drawn == [sorted(batch) for batch in undisturbed]


def test_another_global_batch_size_continues_with_the_next_pair(sources, undisturbed):
    drawn = joined(undisturbed)
    assert joined(take(batches(sources, global_batch_size=7, position=36), 6)) == drawn[36:78]


def test_proportions_are_exact_over_a_period_and_each_source_has_its_own_epochs(sources):
    drawn = joined(take(batches(sources, proportions="6:1:1:1:1:1:1"), 12))
    of = [[number for number in drawn if number // PAIRS == source] for source in range(7)]
    assert [len(part) for part in of] == [72, 12, 12, 12, 12, 12, 12]
    for source, part in enumerate(of):
        epochs = [sorted(part[start : start + PAIRS]) for start in range(0, len(part), PAIRS)]
        assert epochs == [list(range(PAIRS * source, PAIRS * source + PAIRS))] * len(epochs)
