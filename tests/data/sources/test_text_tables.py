"""Every line of a table is a pair or a bad sample with a reason, independent of the lines around it."""

import bz2
import csv
import gzip
import io
import lzma
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import captions_or_reasons, image_bytes

from clip_jax.data.sources import open_source, text_rows
from clip_jax.data.sources.text_rows import delimited_rows


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(image_bytes(ord(name)))


def read(tmp_path, kind: str, data: bytes | str, options: str = "", name: str = "pairs"):
    (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return open_source(f"{kind}:{tmp_path}/{name}{options}")


BAD = "damaged_record"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ('a.png\t"Hello\nb.png\tplain\nc.png\tthe "end"\n', [['"Hello'], ["plain"], ['the "end"']]),
        ('a.png\t"whole"\nb.png\t""\n', [['"whole"'], ['""']]),
        ("a.png\tone\ttwo\nb.png\nc.png\tthree\t\n", [BAD, BAD, ["three"]]),
        ("a.png\tone\r\nb.png\ttwo\u2028three\r\n", [["one"], ["two\u2028three"]]),
        ("a.png\tone\rtwo\nb.png\tx\x0cy\x85z", [["one\rtwo"], ["x\x0cy\x85z"]]),
        ("\n  \na.png\tone\n\n", [["one"]]),
        ("\t\n", ["no_image"]),
    ],
)
def test_each_line_of_a_tsv_is_a_row_and_quotes_are_characters(tmp_path, rows, expected):
    assert captions_or_reasons(read(tmp_path, "tsv", "image\tcaption\n" + rows)) == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ('a.png,"one, ""two""\nthree"\nb.png,x\n', [['one, "two"\nthree'], ["x"]]),
        ('a.png,"open\nb.png,x\nc.png,y\n', [BAD, ["x"], ["y"]]),
        ('a.png,"open\nb.png,x\nc.png,"y"\n', [BAD, ["x"], ["y"]]),
        ('a.png,"open\nb.png,"open too\nc.png,y\n', [BAD, BAD, ["y"]]),
        ('a.png,"open\nb.png,"x\ny"\n', [BAD, ["x\ny"]]),
        ('a.png,"World" she said\nb.png,5" pipe\n', [["World she said"], ['5" pipe']]),
        ("a.png,one, two\nb.png\nc.png,x,,\n", [BAD, BAD, ["x"]]),
        ("a.png,x\0y\nb.png,y\n", [BAD, ["y"]]),
        ("a.png,one\r\n\r\nb.png,two\r\n", [["one"], ["two"]]),
        ("a.png,one\rtwo\nb.png,x\n", [["one\rtwo"], ["x"]]),
        (b"a.png,caf\xe9\nb.png,caf\xc3\xa9\n", [BAD, ["café"]]),
        (b'a.png,"caf\xe9\nx"\nb.png,y\n', [BAD, BAD, ["y"]]),
        ("a.png,\n,x\nnone.png,x\n", ["empty_caption", "no_image", "unreadable_file"]),
        ("image,caption\n", ["unreadable_file"]),
    ],
)
def test_a_damaged_row_of_a_csv_does_not_affect_others(tmp_path, rows, expected):
    source = read(tmp_path, "csv", b"image,caption\n" + (rows if isinstance(rows, bytes) else rows.encode()))
    assert captions_or_reasons(source) == expected
    for reason in {BAD, "empty_caption", "no_image"} & {one for one in expected if isinstance(one, str)}:
        assert any(f"bad rows in all files: {reason} {expected.count(reason)}, such as" in n for n in source.notes())


@given(st.lists(st.lists(st.text('a",\n\r é', max_size=4), min_size=2, max_size=2), max_size=5))
@settings(max_examples=300, deadline=None)
def test_what_pythons_csv_writes_is_read_back(tmp_path_factory, rows):
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([["x", "y"], *rows])
    file = tmp_path_factory.getbasetemp() / "written.csv"
    file.write_bytes(stream.getvalue().encode())
    header, *found = delimited_rows(str(file), ",", quotes=True)
    assert (header, [list(row.values.values()) for row in found]) == (["x", "y"], rows)


def test_an_unclosed_quote_costs_neither_memory_nor_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(text_rows, "MAX_QUOTED", 1_000)
    rows = 'a.png,"open\n' + "b.png,x\n" * 500
    assert captions_or_reasons(read(tmp_path, "csv", "image,caption\n" + rows)) == [BAD, *[["x"]] * 500]


def test_lines_may_end_with_carriage_returns_alone(tmp_path):
    assert captions_or_reasons(read(tmp_path, "csv", 'image,caption\ra.png,one\rb.png,"x\ry"')) == [["one"], ["x\ry"]]
    json_lines = '{"image": "a.png", "caption": "one"}\r{"image": "b.png", "caption": "two"}\r'
    assert captions_or_reasons(read(tmp_path, "jsonl", json_lines)) == [["one"], ["two"]]


def test_lines_of_json_are_pairs_or_bad_samples(tmp_path):
    lines = [
        b'\xef\xbb\xbf{"image": "a.png", "caption": ["x", null], "url": 1}\r',
        b"",
        b"null",
        b'{"image": 3, "caption": "x"}',
        b'{"image": "a.png", "caption": {"en": "x"}}',
        b'{"image": "a.png", "caption": "\xff"}',
        b'{"image": "b.png", "caption": "\xe2\x80\xa8y"}',
        b'{"image": "b.png", "capt',
    ]
    source = read(tmp_path, "jsonl", b"\n".join(lines))
    assert captions_or_reasons(source) == [["x"], BAD, "no_image", BAD, BAD, ["y"], BAD]
    assert source.notes()[0] == "not used: entries url"


COMPRESSED = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pytest.importorskip("zstandard").compress(data),
}
ROWS = b"image,caption\n" + b"a.png,a caption\n" * 2_000


@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_compressed_table_has_the_same_rows_and_its_damage_is_counted(tmp_path, kind):
    compress = COMPRESSED[kind]
    plain = read(tmp_path, "csv", ROWS)
    whole = compress(ROWS[:1_006]) + compress(ROWS[1_006:])
    source = read(tmp_path, "csv", whole, name=f"pairs.csv.{kind}")
    assert source.fingerprint() == plain.fingerprint()
    for damaged in (compress(ROWS) + compress(ROWS)[:-6], compress(ROWS) + b"a.png,not compressed\n"):
        found = read(tmp_path, "csv", damaged, name=f"damaged.{kind}")
        reason = [reason for reason in captions_or_reasons(found) if isinstance(reason, str)]
        assert len(found) > 2_000 and reason[-1] == "truncated_file"
        assert "the compressed data end here, too early, or are damaged" in found.notes()[-1]


@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [
        ("csv", b"", "only an empty first line"),
        ("csv", b"\xef\xbb\xbf\n", "only an empty first line"),
        ("csv", "image,caption\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("csv", b"PK\x03\x04 and so on", "is a ZIP archive"),
        ("csv", b"image,caption,caption\na.png,x,y\n", "has 2 columns 'caption'; rename all but one"),
        ("csv", b"\0" * 600, "line 1: it holds a zero byte"),
        ("csv", gzip.compress(b"image,caption\n", mtime=0)[:12], "line 1: the compressed data end here"),
        ("tsv", b'"image"\t"caption"\n"a.png"\t"x"\n', "read its quotes with csv:"),
        ("csv", b"image,caption\n", "has no rows"),
    ],
)
def test_a_file_that_is_not_a_table_is_refused_in_one_line(tmp_path, kind, data, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        read(tmp_path, kind, data)
    assert "\n" not in str(caught.value)


def test_csv_quotes_in_a_tsv_are_reported_and_can_be_read(tmp_path):
    data = 'image\tcaption\na.png\t"he said ""hi"""\n'
    source = read(tmp_path, "tsv", data, name="pairs.tsv")
    assert source[0].captions == ['"he said ""hi"""']
    assert source.notes() == [
        f"1 rows have quoted values, whose quotes are kept; to remove them, write csv:{tmp_path}/pairs.tsv"
    ]
    assert open_source(f"csv:{tmp_path}/pairs.tsv")[0].captions == ['he said "hi"']


def test_a_column_with_a_dot_precedes_an_entry_of_json_and_a_note_states_it(tmp_path):
    data = 'image,caption.en,caption,more\na.png,column,"{""en"": ""entry"", ""de"": ""Eintrag""}",x\n'
    source = read(tmp_path, "csv", data, "?caption=caption.en,caption.de")
    assert source[0].captions == ["column", "Eintrag"]
    assert source.notes() == [
        "not used: columns more",
        "caption.en is the column of that name, not the entry en of caption",
    ]
    with pytest.raises(ValueError, match=r"has no column 'text\.en' and no 'text', only image"):
        read(tmp_path, "csv", data, "?caption=text.en")


def test_a_pattern_is_several_tables_with_images_relative_to_each(tmp_path):
    for number in range(2):
        folder = tmp_path / f"part{number}"
        folder.mkdir()
        (folder / "a.png").write_bytes(image_bytes(number))
        (folder / "pairs.csv").write_text(f"image,caption{',width' * number}\na.png,number {number}{',5' * number}\n")
    for name in ("part{0..1}/pairs.csv", "part*/pairs.csv", f"part0/pairs.csv,{tmp_path}/part1/pairs.csv"):
        source = open_source(f"csv:{tmp_path}/{name}")
        assert captions_or_reasons(source) == [["number 0"], ["number 1"]]
        assert [source[index].image for index in range(2)] == [image_bytes(0), image_bytes(1)]
        assert source.notes() == ["not used: columns width (in 1 of 2 files)"]
    with pytest.raises(FileNotFoundError, match=r"no file .*part2/pairs\.csv"):
        open_source(f"csv:{tmp_path}/part{{0..2}}/pairs.csv")
    (tmp_path / "pairs [1],{2}.csv").write_text("image,caption\na.png,x\n")
    assert len(open_source(f"csv:{tmp_path}/pairs [1],{{2}}.csv")) == 1


def test_a_pipe_or_a_device_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    rows = f"image,caption\n{tmp_path}/pipe,x\n/dev/zero,x\n{tmp_path},x\n"
    assert captions_or_reasons(read(tmp_path, "csv", rows)) == ["unreadable_file"] * 3
    for kind in ("csv", "wds", "parquet", "array_record", "karpathy"):
        with pytest.raises(OSError, match=r"is a pipe, socket or device|no ArrayRecord file"):
            open_source(f"{kind}:{tmp_path}/pipe")
