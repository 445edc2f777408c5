"""Shards in a list are skipped: the source stays the same source, and their records are replaced."""

import pickle

import msgpack
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from shards import image_bytes, pair_members, write_tar

from clip_jax.data.bad_samples import REASONS, BadSamples
from clip_jax.data.sources import PairError, open_source
from clip_jax.data.sources.skipping import read_skipped

PATHS = ["/data/a.tar", "/data/b.tar", "/more/b.tar", "/more/c.tar"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", set()),
        ("a.tar\n", {0}),
        ("b.tar", {1, 2}),
        ("/more/b.tar  # damaged\n\n# nothing\na.tar\r\n", {0, 2}),
    ],
)
def test_a_list_names_shards_by_path_or_name(tmp_path, text, expected):
    (tmp_path / "skip.txt").write_text(text)
    assert read_skipped(str(tmp_path / "skip.txt"), PATHS).shards == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"d.tar", "there is no shard d.tar; did you mean [abc].tar"),
        (b"a.tar\nb.tar\nc.tar", "lists all shards"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_wrong_list_is_one_line(tmp_path, content, expected):
    (tmp_path / "skip.txt").write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        read_skipped(str(tmp_path / "skip.txt"), PATHS)
    with pytest.raises(FileNotFoundError):
        read_skipped(str(tmp_path / "none.txt"), PATHS)


def write_wds(folder, numbers: range, name: str) -> None:
    write_tar(folder / f"{name}.tar", pair_members(numbers))


def write_parquet(folder, numbers: range, name: str) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": [image_bytes(n) for n in numbers], "caption": [f"number {n}" for n in numbers]}
    parquet.write_table(pyarrow.table(columns), folder / f"{name}.parquet")


def write_records(folder, numbers: range, name: str) -> None:
    writer = ArrayRecordWriter(str(folder / f"{name}.array_record"), "group_size:1")
    for n in numbers:
        writer.write(msgpack.packb({"key": str(n), "image": image_bytes(n), "captions": [f"number {n}"]}))
    writer.close()


@pytest.mark.parametrize(
    ("kind", "ending", "write"),
    [("wds", "tar", write_wds), ("parquet", "parquet", write_parquet), ("array_record", "array_record", write_records)],
)
def test_the_records_of_skipped_shards_are_bad_samples_of_the_same_data(tmp_path, kind, ending, write):
    for shard, name in enumerate("abc"):
        write(tmp_path, range(3 * shard, 3 * shard + 3), name)
    where = f"{kind}:{tmp_path}/*.{ending}"
    whole = open_source(where)
    (tmp_path / "skip.txt").write_text(f"b.{ending}\n")
    source = pickle.loads(pickle.dumps(open_source(f"{where}?skip={tmp_path}/skip.txt")))
    assert len(source) == len(whole) == 9
    assert source.fingerprint() == whole.fingerprint()
    for index in range(9):
        if index in (3, 4, 5):
            with pytest.raises(PairError, match=rf"b\.{ending} is skipped by ") as error:
                source[index]
            assert error.value.reason == "skipped_shard"
        else:
            assert source[index].captions == whole[index].captions == [f"number {index}"]
    assert f"skipped by {tmp_path}/skip.txt: 1 of 3 shards, 3 records" in source.notes()


def test_a_lost_or_rewritten_shard_is_skipped_if_an_index_knows_it(tmp_path):
    for shard, name in enumerate("abc"):
        write_wds(tmp_path, range(3 * shard, 3 * shard + 3), name)
    where = f"wds:{tmp_path}/{{a,b,c}}.tar"
    before = open_source(where).fingerprint()
    (tmp_path / "b.tar").unlink()
    write_wds(tmp_path, range(70), "c")
    (tmp_path / "skip.txt").write_text("b.tar\nc.tar\n")
    with pytest.raises(FileNotFoundError):
        open_source(where)
    source = open_source(f"{where}?skip={tmp_path}/skip.txt")
    assert source.fingerprint() == before
    assert source[1].captions == ["number 1"]


def test_skipped_samples_do_not_end_a_run(tmp_path):
    counts = [0] * len(REASONS)
    counts[REASONS.index("skipped_shard")] = 900
    BadSamples(tmp_path / "bad_samples.jsonl").check(counts, 1_000, 0.1)
