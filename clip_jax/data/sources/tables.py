"""Reads pairs whose images are separate files, listed in a table (CSV, TSV, JSON lines, Karpathy's JSON) or a folder.

The rows are kept in a memory-mapped index, which all processes of a machine share.
"""

import array
import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import msgpack
import numpy as np

from clip_jax.data.sources.base import Pair, PairError, ShardError
from clip_jax.data.sources.buckets import is_remote
from clip_jax.data.sources.digest import digest
from clip_jax.data.sources.fields import (
    Fields,
    column_notes,
    column_of,
    count_files,
    name_some,
    nested,
    parse_fields,
    split_options,
)
from clip_jax.data.sources.files import expand, join, read_whole, stamp
from clip_jax.data.sources.mapped_index import MappedIndex, Tables, open_or_build
from clip_jax.data.sources.text_rows import CompressedDataError, TextRow, delimited_rows, json_rows, open_text
from clip_jax.errors import one_line

TABLE_VERSION = 2  # of the index's content, to which the messages of bad rows belong
DEFAULT_FIELDS = Fields(image=("image",), captions=(("caption", 1.0),))
TABS = re.compile(r"\.tsv(\.\w+)?$", re.IGNORECASE)
ROWS_PER_WRITE = 4_096
EXAMPLES = 3  # per reason of bad rows
KARPATHY_KEYS = {"filename", "filepath", "split", "sentences"}
MAX_KEYS = 1_000  # of JSON objects, for the notes


class Row(NamedTuple):
    """The path of an image relative to the table's folder, and its texts; or ``problem``: a reason and a message."""

    image: str
    captions: list[str]
    proportions: list[float]
    label: str
    problem: tuple[str, str] | None = None


# Yields the rows of one file, and adds notes to the counter.
ReadRows = Callable[[Counter], Iterable[Row]]


class TableSource:
    """Pairs from the rows of an index. Images are read on access.

    Args:
      roots: the folder of each file; paths of images are relative to it.
      index: ``rows`` uint8 ``[bytes]``, the packed rows; ``ends`` int64 ``[rows]``, where each ends; ``files`` int64
        ``[files]``, the number of rows up to the end of each file.
      notes: see :meth:`Source.notes`, in addition to those in the index.
    """

    def __init__(self, roots: Sequence[str], index: MappedIndex, notes: Sequence[str] = ()):
        self._roots, self._index, self._notes = list(roots), index, list(notes)
        self._read_arrays()

    def _read_arrays(self) -> None:
        self._ends, self._rows, self._files = (self._index.arrays[name] for name in ("ends", "rows", "files"))

    def __getstate__(self) -> dict:
        return {"_roots": self._roots, "_index": self._index, "_notes": []}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._read_arrays()

    def __len__(self) -> int:
        return len(self._ends)

    def _row(self, index: int) -> Row:
        start = int(self._ends[index - 1]) if index else 0
        row = Row(*msgpack.unpackb(self._rows[start : int(self._ends[index])].tobytes()))
        if row.problem:
            raise PairError(row.problem[1], row.problem[0])
        return row

    def _path(self, index: int, row: Row) -> str:
        return join(self._roots[int(np.searchsorted(self._files, index, side="right"))], row.image)

    def read_metadata(self, index: int) -> tuple[str, list[str], str]:
        """Returns label, captions and the image's path without reading the image. Raises as ``__getitem__``."""
        row = self._row(index)
        return row.label, row.captions, self._path(index, row)

    def __getitem__(self, index: int) -> Pair:
        row = self._row(index)
        path = self._path(index, row)
        try:
            image = read_whole(path)
        except ShardError:
            raise
        except Exception as error:  # the path in a table may be any text
            reason = getattr(error, "strerror", None) or one_line(error)
            message = reason if reason.startswith(path) else f"{path}: {reason}"
            raise PairError(message, "unreadable_file") from None
        return Pair(image, row.captions, path, row.label, row.proportions)

    def notes(self) -> list[str]:
        notes = count_files(self._index.meta["notes"], len(self._roots))
        for reason, (count, examples) in self._index.meta["bad"].items():
            notes.append(f"bad rows in all files: {reason} {count:,}, such as {'; '.join(examples)}")
        return [*self._notes, *notes]

    def fingerprint(self) -> str:
        return self._index.meta["fingerprint"]


def open_rows(
    name: str,
    content: object,
    files: Sequence[tuple[str, ReadRows]],
    folder: str = "",
    also: object = None,
    notes: Sequence[str] = (),
) -> TableSource:
    """Opens the source of the rows of these files, and builds a missing index.

    Args:
      name: name of the source, for the index.
      content: JSON that changes whenever the rows change.
      files: for each file, the folder to which its images' paths are relative, and what reads its rows.
      folder: folder of the index; empty for the default.
      also: JSON that belongs to the fingerprint, in addition to the rows.
      notes: see :class:`TableSource`.
    """
    roots = [root for root, _ in files]

    def build(_) -> Tables:
        # A temporary file, since a table can be larger than memory.
        with tempfile.TemporaryFile() as blob:
            return _tables([read for _, read in files], blob, also)

    names = digest(name, *roots)
    return TableSource(roots, open_or_build("table", names, digest(TABLE_VERSION, content), folder, build), notes)


def _tables(readers: Sequence[ReadRows], blob: BinaryIO, also: object) -> Tables:
    fingerprint, waiting = hashlib.sha256(json.dumps(also).encode()), []
    ends, files, size = array.array("q"), array.array("q"), 0
    notes, bad = Counter(), {}

    def write() -> None:
        data = b"".join(waiting)
        fingerprint.update(data)
        blob.write(data)
        waiting.clear()

    for read in readers:
        file_notes = Counter()
        for row in read(file_notes):
            packed, problem = _pack(row)
            if problem:
                count, examples = bad.get(problem[0], (0, []))
                bad[problem[0]] = (count + 1, [*examples, problem[1]][:EXAMPLES])
            waiting.append(packed)
            size += len(packed)
            ends.append(size)
            if len(waiting) == ROWS_PER_WRITE:
                write()
        files.append(len(ends))
        notes.update(file_notes.keys())
    write()
    blob.flush()
    rows = np.memmap(blob, np.uint8, mode="r", shape=(size,)) if size else np.zeros(0, np.uint8)
    arrays = {"ends": np.array(ends, np.int64), "files": np.array(files, np.int64), "rows": rows}
    return Tables({"fingerprint": fingerprint.hexdigest()[:16], "notes": notes, "bad": bad}, arrays)


def _pack(row: Row) -> tuple[bytes, tuple[str, str] | None]:
    try:
        return msgpack.packb(row), row.problem
    except UnicodeEncodeError:
        text = row.problem[1] if row.problem else row.image
        problem = ("damaged_record", f"{text!a} has a text with half a character")
        return msgpack.packb(Row("", [], [], "", problem)), problem


def open_karpathy(where: str) -> TableSource:
    """Opens Karpathy's annotations of Flickr30k or COCO: one JSON file of images with sentences, in splits.

    The option ``split`` is one of ``train``, ``restval``, ``val`` and ``test`` (by default all), ``images`` is the
    folder of the images (by default that of the file).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not in that format, or has no images of the split.
    """
    path, options = split_options(where)
    sentences = Fields((), (("sentences", 1.0),))
    fields, others = parse_fields(options, sentences, f"karpathy:{where}", also=("index", "split", "images"))
    now, split = stamp(path), others.get("split", "")
    root = others.get("images") or os.path.dirname(os.path.abspath(path))
    text = read_text(path)
    try:
        entries = json.loads(text)["images"]
        found = [
            (
                "/".join(filter(None, [entry.get("filepath", ""), entry["filename"]])),
                [sentence["raw"] for sentence in entry["sentences"]],
            )
            for entry in entries
            if split in ("", entry["split"])
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not Karpathy's JSON of images with sentences: {type(error).__name__}") from None
    if not found:
        raise ValueError(f"{path} has no images of the split {split!r}")

    other_splits = Counter(str(entry["split"]) for entry in entries if split not in ("", entry["split"]))
    notes = [f"not used: {count:,} images of the split {name}" for name, count in other_splits.items()]
    keys = Counter(key for entry in entries for key in entry)
    unread = [f"{key} ({count:,})" for key, count in keys.items() if key not in KARPATHY_KEYS]
    notes += [f"not used: entries {name_some(unread)}"] * bool(unread)

    def rows(_: Counter) -> Iterator[Row]:
        for image, texts in found:
            yield make_row(image, f"{path}, {image}", fields, lambda _, texts=texts: texts)

    content = [list(now), split, repr(fields)]
    return open_rows("karpathy", content, [(root, rows)], others.get("index", ""), notes=notes)


def open_table(kind: str, where: str) -> TableSource:
    """Opens CSV or TSV files with a header, or JSON lines. ``kind`` is csv, tsv or jsonl.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a column is missing, a file is not in the expected format, or there are no rows.
    """
    path, options = split_options(where)
    fields, others = parse_fields(options, DEFAULT_FIELDS, f"{kind}:{where}", also=("index",))
    if len(fields.image) > 1:
        raise ValueError(f"{kind}:{where}: image={','.join(fields.image)} must be one column")
    paths = expand(path)
    stamps = [list(stamp(path)) for path in paths]
    roots = [path.rpartition("/")[0] if is_remote(path) else os.path.dirname(os.path.abspath(path)) for path in paths]

    def read_rows(path: str) -> ReadRows:
        def rows(notes: Counter) -> Iterator[Row]:
            read = _json_table(path, fields, notes) if kind == "jsonl" else _delimited_table(kind, path, fields, notes)
            for line, values, problem in read:
                name = f"{path}, line {line}"
                if problem:
                    yield Row("", [], [], "", (problem[0], f"{name}: {problem[1]}"))
                    continue
                yield _table_row(name, fields, nested(values, name))

        return rows

    content, also = [stamps[0], repr(fields)], None  # a list would change the fingerprint of a single file
    if len(paths) > 1:
        content, also = [stamps, repr(fields)], _relative(paths)
    names = ",".join(map(os.path.basename, paths))
    name = f"{kind} {names}"
    files = [(root, read_rows(path)) for root, path in zip(roots, paths, strict=True)]
    source = open_rows(name, content, files, others.get("index", ""), also)
    if not len(source):
        raise ValueError(f"{', '.join(paths)} has no rows")
    return source


def _relative(paths: Sequence[str]) -> list[str]:
    """Returns the paths relative to their deepest common folder, which may be moved."""
    names = [path.split("/") for path in paths]
    shared = next((depth for depth, found in enumerate(zip(*names, strict=False)) if len(set(found)) > 1), 0)
    return ["/".join(name[shared:]) for name in names]


def _table_row(name: str, fields: Fields, get: Callable[[str], object]) -> Row:
    try:
        image = get(fields.image[0])
    except PairError as error:
        return Row("", [], [], "", (error.reason, str(error)))
    if not isinstance(image, str) or not image.strip():
        return Row("", [], [], "", ("no_image", f"{name}: the {fields.image[0]} is empty"))
    return make_row(image.strip(), name, fields, get)


def make_row(image: str, name: str, fields: Fields, get: Callable[[str], object]) -> Row:
    """Returns the row of an image, whose captions and class ``get`` gives by field."""
    try:
        captions, proportions = fields.captions_of(get, name)
        return Row(image, captions, proportions, fields.label_of(get))
    except PairError as error:
        return Row(image, [], [], "", (error.reason, str(error)))


def _delimited_table(kind: str, path: str, fields: Fields, notes: Counter) -> Iterator[TextRow]:
    """Yields the rows of a CSV or TSV after its header. ``csv:`` reads .tsv files with tabs, and with a CSV's quotes.

    Raises:
      ValueError: a column is missing, or occurs twice.
    """
    tabs = kind == "tsv" or TABS.search(path)
    rows = delimited_rows(path, "\t" if tabs else ",", quotes=kind == "csv")
    columns = next(rows, [])
    wanted = [("image", fields.image[0]), *(("caption", field) for field, _ in fields.captions)]
    for option, field in wanted + [("label", fields.label)] * bool(fields.label):
        column = column_of(columns, field)
        if column is None:
            quoted = any(column.startswith('"') for column in columns) and kind == "tsv"
            how = f"read its quotes with csv:{path}" if quoted else f"name it with {kind}:{path}?{option}=..."
            name = field if "." not in field else f"{field}' and no '{field.partition('.')[0]}"
            raise ValueError(
                f"{path} has no column '{name}', only {name_some(columns) or 'an empty first line'}; {how}"
            )
        if columns.count(column) > 1:
            raise ValueError(f"{path} has {columns.count(column)} columns {column!r}; rename all but one")
    quoted = 0
    if kind == "csv":
        yield from rows
    for row in rows:
        yield row
        quoted += any(value[:1] == '"' == value[-1:] and len(value) > 1 for value in row.values.values())
    notes.update(column_notes(columns, fields))
    if quoted:
        notes[f"{quoted:,} rows have quoted values, whose quotes are kept; to remove them, write csv:{path}"] += 1


def _json_table(path: str, fields: Fields, notes: Counter) -> Iterator[TextRow]:
    keys: dict[str, None] = {}
    for row in json_rows(path):
        yield row
        if not row.values.keys() <= keys.keys() and len(keys) < MAX_KEYS:
            keys |= dict.fromkeys(row.values)
    notes.update(column_notes(keys, fields, "entries"))


def read_text(file: str) -> str:
    """Returns the text of a file, which may be compressed. Raises ValueError if it is not UTF-8, or OSError."""
    try:
        with open_text(file) as opened:
            return opened.read().decode("utf-8-sig")  # some programs write a byte order mark
    except CompressedDataError as error:
        raise ValueError(f"{file}: the compressed data are damaged: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from None
