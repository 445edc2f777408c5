"""The index of a tar finds what the standard library finds, and never fails on damaged data."""

import contextlib
import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import image_bytes, pair_members, write_tar

from clip_jax.data.sources import tar_index
from clip_jax.data.sources.tar_index import index_shard, pack, unpack
from clip_jax.data.sources.tar_members import members_by_tarfile, read_record, split_name

KINDS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def records_of(data: bytes) -> tuple[list[tuple[dict[str, bytes], str]], str]:
    """Returns the files of each record by name and its problem, as a source reads them."""
    records, _, problem, _ = index_shard(data)
    found = []
    for record in records.tolist():
        start, length, wrong = unpack(record)
        key, fields = ("", {}) if wrong else read_record(data[start : start + length])
        found.append(({f"{key}.{field}": content for field, content in fields.items()}, wrong))
    return found, problem


def tar_bytes(members, kind, tmp_path) -> bytes:
    write_tar(tmp_path / "a.tar", members, kind)
    return (tmp_path / "a.tar").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_each_record_is_the_files_of_one_key(tmp_path, kind):
    members = pair_members(range(20))
    found, problem = records_of(tar_bytes(members, kind, tmp_path))
    assert problem == ""
    assert [record for record, _ in found] == [dict(members[3 * i : 3 * i + 3]) for i in range(20)]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["x" * 180, "folder/" * 30 + "a", "Überraschung", "日本語"])
def test_names_too_long_for_a_header_are_read_in_full(tmp_path, kind, name):
    members = [(f"{name}.png", b"1"), (f"{name}.txt", b"2"), ("b.png", b"3"), ("b.txt", b"4")]
    found, problem = records_of(tar_bytes(members, kind, tmp_path))
    assert ([record for record, _ in found], problem) == ([dict(members[:2]), dict(members[2:])], "")


def test_a_long_name_of_a_posix_header_is_joined(tmp_path):
    name = "/".join(["folder" * 5] * 4) + "/image"
    found, _ = records_of(tar_bytes([(f"{name}.png", b"1"), (f"{name}.txt", b"2")], tarfile.USTAR_FORMAT, tmp_path))
    assert [list(record) for record, _ in found] == [[f"{name}.png", f"{name}.txt"]]


def test_a_tar_inside_a_tar_is_a_file(tmp_path):
    inner = tar_bytes(pair_members(range(3)), tarfile.USTAR_FORMAT, tmp_path)
    members = [("a.png", inner), ("a.txt", b"words"), ("b.png", image_bytes(1)), ("b.txt", b"more")]
    found, problem = records_of(tar_bytes(members, tarfile.USTAR_FORMAT, tmp_path))
    assert ([record for record, _ in found], problem) == ([dict(members[:2]), dict(members[2:])], "")


def test_folders_and_links_are_not_records(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, kind in (("./", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type = kind
            tar.addfile(entry)
        for name, content in pair_members(range(1)):
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    found, problem = records_of(stream.getvalue())
    assert ([wrong for _, wrong in found], problem) == ([""], "")
    assert len(found[0][0]) == 3


def test_the_index_has_the_problems_of_records(tmp_path):
    members = [("a.png", b"1"), ("a.txt", b"2"), ("../b.png", b"3"), ("/c.png", b"4"), ("a.png", b"5"), ("d.png", b"6")]
    found, problem = records_of(tar_bytes(members, tarfile.GNU_FORMAT, tmp_path))
    assert problem == ""
    assert [wrong for _, wrong in found] == ["", "unsafe_name", "unsafe_name", "duplicate_key", ""]


def test_files_that_webdataset_ignores_do_not_split_a_record(tmp_path):
    members = pair_members(range(2))
    extra = [("._000000.txt", b"x"), ("README", b"x"), ("__meta__", b"x")]
    mixed = [members[0], *extra, *members[1:3], *extra, *members[3:]]
    found, problem = records_of(tar_bytes(mixed, tarfile.USTAR_FORMAT, tmp_path))
    assert ([record for record, _ in found], problem) == ([dict(members[:3]), dict(members[3:])], "")


def test_the_checksum_differs_for_other_contents_of_equal_sizes(tmp_path):
    sums = set()
    for numbers in (range(10, 20), range(20, 30), range(10, 20)):
        sums.add(index_shard(tar_bytes(pair_members(numbers), tarfile.USTAR_FORMAT, tmp_path)).checksum)
    assert len(sums) == 2


NAMES = st.text("aB.-/_", min_size=1, max_size=12) | st.sampled_from(["a.jpg", "a.txt", "b/a.JPG", "b/a.jpg", "x" * 99])


@settings(max_examples=300, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=12), st.sampled_from(KINDS), st.integers(0, 12), st.integers(0, 3))
def test_reading_headers_at_once_equals_reading_them_one_by_one(names, kind, first, blocks):
    """Also for two joined archives: ``first`` is the number of names in the first, ``blocks`` of zeros between them."""
    whole = b"".join((archive(names[:first], kind), bytes(512 * blocks), archive(names[first:], kind)))
    data = np.frombuffer(whole, np.uint8)
    members, contents, damage = members_by_tarfile(data)
    assert damage.text == ""
    found = index_shard(data)
    assert found.records.tolist() == list(tar_index._records(members, len(data), contents))
    assert found.contents == contents


def archive(names: list[str], kind: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
        for number, name in enumerate(names):
            entry = tarfile.TarInfo(name)
            entry.size = 300 * number
            with contextlib.suppress(ValueError):  # a name of slashes alone
                tar.addfile(entry, io.BytesIO(bytes(300 * number)))
    return stream.getvalue()


def test_a_repeated_field_starts_a_duplicate_record(tmp_path):
    members = [("a.png", b"1"), ("a.txt", b"2"), ("a.png", b"3"), ("a.txt", b"4")]
    found, _ = records_of(tar_bytes(members, tarfile.GNU_FORMAT, tmp_path))
    assert found == [(dict(members[:2]), ""), ({}, "duplicate_key")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tar_cut_anywhere_keeps_its_complete_records_and_reports_the_cut(tmp_path, kind):
    members = pair_members(range(4))
    data = tar_bytes(members, kind, tmp_path)
    whole = [unpack(record) for record in index_shard(data).records.tolist()]
    for kept in range(1, whole[-1][0] + whole[-1][1], 97):
        records, _, problem, _ = index_shard(data[:kept])
        ends = [start + length for start, length, _ in whole]
        intact = sum(end <= kept for end in ends)
        found = [unpack(record) for record in records.tolist()]
        assert [record for record in found if not record[2]][:intact] == whole[:intact], kept
        assert problem, kept


def test_a_damaged_header_in_the_middle_is_reported_and_counts_as_one_bad_record(tmp_path):
    data = bytearray(tar_bytes(pair_members(range(4)), tarfile.GNU_FORMAT, tmp_path))
    start, _, _ = unpack(index_shard(bytes(data)).records.tolist()[2])
    data[start : start + 512] = b"\xff" * 512
    found, problem = records_of(bytes(data))
    assert [wrong for _, wrong in found] == ["", "", "truncated_file"]
    assert problem


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_bytes_make_the_index_fail_or_hang(data):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=data.draw(st.sampled_from(KINDS))) as tar:
        for name, content in pair_members(range(3)):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), 0.5
            tar.addfile(entry, io.BytesIO(content))
    mutated = bytearray(whole.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    mutated = bytes(mutated[: data.draw(st.integers(0, len(mutated)))])
    readable(mutated)


def readable(data: bytes) -> None:
    """Reads all records of the index."""
    for record in index_shard(data).records.tolist():
        start, length, wrong = unpack(record)
        if not wrong:
            with contextlib.suppress(tarfile.TarError):
                _, fields = read_record(data[start : start + length])
                assert all(isinstance(content, bytes) for content in fields.values())


def with_checksum(header: bytearray) -> bytes:
    """A malicious header: a valid checksum, and arbitrary fields."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_header_with_a_valid_checksum_makes_the_index_fail_or_hang(data):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=data.draw(st.sampled_from(KINDS))) as tar:
        for name, content in pair_members(range(2)):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), 0.5
            tar.addfile(entry, io.BytesIO(content))
    whole = bytearray(stream.getvalue())
    offset = 512 * data.draw(st.integers(0, 5))
    header = whole[offset : offset + 512]
    size = data.draw(st.sampled_from([b"size", b"kind"]))
    if size == b"size":
        number = data.draw(st.sampled_from([-1, -512, -1024, -1536, -(2**40), 2**33, 2**50, 2**60, 2**63 - 1]))
        header[124:136] = (
            b"\x80" + number.to_bytes(11, "big") if number >= 0 else number.to_bytes(12, "big", signed=True)
        )
    header[156:157] = data.draw(st.sampled_from([b"0", b"\0", b"L", b"K", b"x", b"g", b"S", b"5", b"1", b"7"]))
    whole[offset : offset + 512] = with_checksum(header)
    readable(bytes(whole))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=2000))
def test_a_file_that_is_not_a_tar_has_no_usable_records(data):
    records, _, problem, _ = index_shard(data)
    assert problem or not any(data)
    assert all(unpack(record)[2] == "truncated_file" for record in records.tolist())


@given(st.integers(0, 2**38 - 1), st.integers(0, 2**23 - 1), st.integers(0, 4))
def test_a_record_is_packed_into_64_bits(start, length, problem):
    packed = pack(start, length, problem)
    assert np.uint64(packed) == packed
    assert unpack(packed)[:2] == (start * 512, length * 512)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a.seg.PNG", ("a", "seg.png")),
        ("x.y/a.txt", ("x.y/a", "txt")),
        ("a", None),
        ("x.y/a", None),
        ("._a.txt", None),
        ("x/.DS_Store", None),
        ("__meta.json__", None),
    ],
)
def test_a_name_is_split_as_by_webdataset(name, expected):
    assert split_name(name) == expected
