"""Shards are read in source_name and in any order, and changed files are noticed."""

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile

import pytest
from shards import captions_or_reasons, image_bytes, pair_members, write_shards, write_tar

from clip_jax.data.sources import PairError, ShardError, open_source


def captions(source) -> list[str]:
    return [source[index].captions[0] for index in range(len(source))]


def test_pairs_come_in_the_order_of_the_shards(tmp_path):
    source = open_source(write_shards(tmp_path, shards=3, pairs=4))
    assert captions(source) == [f"number {number}" for number in range(12)]
    assert source[7].image == image_bytes(7)
    assert source[7].key == f"{tmp_path}/00001.tar: 000007"


def test_fields_have_proportions_and_labels_come_from_the_json(tmp_path):
    name = write_shards(tmp_path, shards=1, pairs=4)
    pair = open_source(f"{name}?caption=txt:3,json.alt:1&label=json.label")[2]
    assert (pair.captions, pair.proportions, pair.label) == (["number 2", "instead 2"], [3.0, 1.0], "class 2")


def test_a_workers_copy_of_a_source_is_small_and_reads_the_same(tmp_path):
    source = open_source(write_shards(tmp_path, shards=2, pairs=50))
    packed = pickle.dumps(source)
    assert len(packed) < 1_000
    assert captions(pickle.loads(packed)) == captions(source)


def test_the_index_is_built_once_and_again_for_a_changed_shard(tmp_path):
    name = write_shards(tmp_path, shards=3, pairs=4)
    source_name = f"{name}?index={tmp_path}/index"
    first = open_source(source_name)
    before = first.fingerprint()
    [folder] = (tmp_path / "index").iterdir()
    stamp = os.stat(folder / "records.npy").st_mtime_ns
    assert open_source(source_name).fingerprint() == before
    assert os.stat(folder / "records.npy").st_mtime_ns == stamp
    write_tar(tmp_path / "00001.tar", pair_members(range(90, 92)))
    changed = open_source(source_name)
    assert len(pickle.loads(pickle.dumps(first))) == 12  # a worker that starts now reads the same as the others
    assert captions(changed) == [f"number {number}" for number in (*range(4), 90, 91, *range(8, 12))]
    assert changed.fingerprint() != before


@pytest.mark.parametrize("damage", ["records.npy", "no firsts.npy", "meta.json"])
def test_a_damaged_index_is_rebuilt(tmp_path, damage):
    source_name = f"{write_shards(tmp_path, shards=1, pairs=4)}?index={tmp_path}/index"
    open_source(source_name)
    [folder] = (tmp_path / "index").iterdir()
    if damage.startswith("no "):
        (folder / damage[3:]).unlink()
    else:
        (folder / damage).write_bytes(b"{}")
    assert len(open_source(source_name)) == 4


def test_the_error_for_an_unwritable_index_names_the_option_for_another_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written to .*/file: Not a directory; choose another folder"):
        open_source(f"{write_shards(tmp_path, shards=1, pairs=4)}?index={tmp_path}/file")


def test_a_copied_data_set_has_the_same_fingerprint(tmp_path):
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    one, other = (open_source(write_shards(tmp_path / folder, 2, 4)) for folder in ("one", "other"))
    assert one.fingerprint() == other.fingerprint()


def test_a_shard_deleted_or_rewritten_later_is_named(tmp_path):
    source = open_source(write_shards(tmp_path, shards=2, pairs=4))
    write_tar(tmp_path / "00000.tar", pair_members(range(4, 8)))  # of the same size
    (tmp_path / "00001.tar").unlink()
    for index, expected in ((3, "has changed since the start"), (5, "No such file")):
        with pytest.raises(ShardError, match=rf"0000{index // 4}\.tar.*{expected}"):
            source[index]


def test_a_shard_rewritten_with_the_same_size_is_other_data(tmp_path):
    name = write_shards(tmp_path, shards=1, pairs=4)
    before, size = open_source(name).fingerprint(), (tmp_path / "00000.tar").stat().st_size
    write_tar(tmp_path / "00000.tar", pair_members(range(4, 8)))
    assert (tmp_path / "00000.tar").stat().st_size == size
    assert open_source(name).fingerprint() != before


def test_processes_can_build_the_same_index_at_once(tmp_path):
    name = f"{write_shards(tmp_path, shards=3, pairs=20)}?index={tmp_path}/index"
    program = f"from clip_jax.data.sources import open_source; print(len(open_source({name!r})))"
    together = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(4)]
    assert [process.communicate(timeout=120)[0] for process in together] == [b"60\n"] * 4
    assert len(list((tmp_path / "index").iterdir())) == 1


@pytest.mark.parametrize(
    ("members", "reason", "expected"),
    [
        ([("a.txt", b"words")], "no_image", "a has no image, only txt"),
        ([("a.jpg", b"1"), ("a.json", b"[" * 100_000)], "empty_caption", "txt is missing"),
        ([("a.jpg", b"1")], "empty_caption", "txt is missing or empty"),
        ([("a.jpg", b"1"), ("a.txt", b" \n")], "empty_caption", "txt is missing or empty"),
        ([("a.jpg", b"1"), ("a.txt", b"\xff")], "damaged_record", "txt is not UTF-8"),
        ([("../a.jpg", b"1"), ("../a.txt", b"x")], "unsafe_name", "is a path outside of"),
    ],
)
def test_a_bad_record_has_a_reason(tmp_path, members, reason, expected):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(PairError, match=expected) as caught:
        open_source(f"wds:{tmp_path}/a.tar")[0]
    assert caught.value.reason == reason


def test_a_truncated_shard_keeps_its_complete_records(tmp_path):
    name = write_shards(tmp_path, shards=1, pairs=4)
    data = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(data[: data.index(b"told 2")])
    assert captions_or_reasons(open_source(name)) == [["number 0"], ["number 1"], "truncated_file"]


def test_invalid_json_is_a_bad_record(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.json", b"{")])
    with pytest.raises(PairError, match="json is no JSON"):
        open_source(f"wds:{tmp_path}/a.tar?caption=json.caption")[0]
    write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.json", b"[" * 100_000)])
    with pytest.raises(PairError, match="json is no JSON"):
        open_source(f"wds:{tmp_path}/a.tar?caption=json.caption")[0]
    write_tar(tmp_path / "b.tar", [("a.jpg", b"1"), ("a.json", json.dumps({"caption": ["x", "y"]}).encode())])
    assert open_source(f"wds:{tmp_path}/b.tar?caption=json.caption")[0].captions == ["x", "y"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("{tmp}/none.tar", "no file"),
        ("{tmp}/*.tar", "no files match"),
        ("{tmp}/empty", "has no records"),
        ("{tmp}/a.tar?captions=txt", "there is no option 'captions', only image, caption"),
        ("{tmp}/a.tar?caption=txt:0", "a proportion above 0"),
        ("{tmp}/a.tar?template=a photo", "one {}"),
        ("{tmp}/a.tar?clean=yes", "must be 0 or 1"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, where, expected):
    if where != "{tmp}/*.tar":
        (tmp_path / "empty").write_bytes(b"")
        write_tar(tmp_path / "a.tar", pair_members(range(1)))
    with pytest.raises((ValueError, OSError)) as caught:
        open_source("wds:" + where.replace("{tmp}", str(tmp_path)))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shard_without_records_is_passed_over_and_told(tmp_path):
    for name, numbers in (("a", range(2)), ("b", ()), ("d", range(2, 3)), ("e", ())):
        write_tar(tmp_path / f"{name}.tar", pair_members(numbers))
    (tmp_path / "c.tar").write_bytes(b"")
    source = open_source(f"wds:{tmp_path}/*.tar")
    assert [captions[0] for captions in captions_or_reasons(source)] == ["number 0", "number 1", "number 2"]
    notes = source.notes()
    assert f"shards without records: 2 of 5, such as {tmp_path}/b.tar" in notes
    assert f"damaged: {tmp_path}/c.tar: it is empty" in notes
    for name in "ad":
        (tmp_path / f"{name}.tar").unlink()
    with pytest.raises(ValueError, match=r"each of the 3 shards, such as .*/b.tar, has no records"):
        open_source(f"wds:{tmp_path}/*.tar")


def tar_bytes(tmp_path, members) -> bytes:
    write_tar(tmp_path / "part.tar", members)
    return (tmp_path / "part.tar").read_bytes()


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (b"", []),
        (bytes(512 * 50), []),
        (b"next", [["number 8"], ["number 9"]]),
        (bytes(512 * 50) + b"next", [["number 8"], ["number 9"]]),
        (b"next" + b"next", [["number 8"], ["number 9"], "duplicate_key", "duplicate_key"]),
        (b"junk" * 500, ["truncated_file"]),
        (b"junk", ["truncated_file"]),
        (b"next" + b"junk" * 128, [["number 8"], ["number 9"], "truncated_file"]),
    ],
)
def test_data_after_the_end_of_an_archive_are_read_or_counted(tmp_path, after, expected):
    """As after ``cat a.tar b.tar``: the first archive has its own end marker."""
    after = after.replace(b"next", tar_bytes(tmp_path, pair_members(range(8, 10))))
    (tmp_path / "a.tar").write_bytes(tar_bytes(tmp_path, pair_members(range(2))) + after)
    source = open_source(f"wds:{tmp_path}/a.tar")
    assert captions_or_reasons(source) == [["number 0"], ["number 1"], *expected]
    assert ("damaged: " in "".join(source.notes())) == ("truncated_file" in expected)


def test_a_compressed_tar_must_be_unpacked(tmp_path):
    (tmp_path / "a.tar").write_bytes(gzip.compress(tar_bytes(tmp_path, pair_members(range(2)))))
    with pytest.raises(PairError, match="compressed by gzip: unpack it"):
        open_source(f"wds:{tmp_path}/a.tar")[0]


ODD = [
    *pair_members(range(2)),
    *[("README", b"x"), ("__meta__", b"x"), ("folder/.DS_Store", b"x")],
    *[("a.png", image_bytes(1)), ("a.jpg", image_bytes(2)), ("a.outputs.txt", b"dotted"), ("a.cls", b"3")],
    *[("b.avif", image_bytes(3, 16, "AVIF")), ("b.txt", b"b"), ("c.txt", b"alone")],
]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_unused_members_are_counted_by_kind(tmp_path, kind):
    write_tar(tmp_path / "a.tar", ODD, kind)
    source = open_source(f"wds:{tmp_path}/a.tar?index={tmp_path}/index")
    assert captions_or_reasons(source) == [["number 0"], ["number 1"], "empty_caption", ["b"], "no_image"]
    notes = source.notes()
    assert notes[0] == "not used: files .json (2), .cls (1), .outputs.txt (1), .png (1)"
    assert notes[1] == "not used: members without a dot (1), called __NAME__ (1), hidden (1)"
    assert notes[2] == "bad records in all shards: no_image 1, empty_caption 1"
    write_tar(tmp_path / "b.tar", ODD, kind)  # copies the index of the first shard
    both = open_source(f"wds:{tmp_path}/{{a,b}}.tar?index={tmp_path}/index")
    assert both.notes()[0] == "not used: files .json (4), .cls (2), .outputs.txt (2), .png (2)"


def test_links_and_sparse_files_are_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            entry = tarfile.TarInfo(f"{kind.decode()}.png")
            entry.type = kind
            tar.addfile(entry)
        for name, content in pair_members(range(1)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    notes = open_source(f"wds:{tmp_path}/a.tar").notes()
    assert "symbolic links (1), hard links (1), devices, pipes and unknown kinds (1)" in notes[1]


def test_a_dot_is_part_of_a_fields_name_if_there_is_such_a_field(tmp_path):
    texts = json.dumps({"txt": "from JSON", "a": {"b": ["x", None, "y"]}}).encode()
    members = [("a.png", image_bytes(1)), ("a.outputs.txt", b"field"), ("b.png", image_bytes(2)), ("b.outputs", texts)]
    write_tar(tmp_path / "a.tar", members)
    assert captions_or_reasons(open_source(f"wds:{tmp_path}/a.tar?caption=outputs.txt")) == [["field"], ["from JSON"]]
    found = captions_or_reasons(open_source(f"wds:{tmp_path}/a.tar?caption=outputs.a.b"))
    assert found == ["empty_caption", ["x", "y"]]
