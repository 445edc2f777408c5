"""Pairs whose images are files of their own: named by a table or an annotation file, or found in a folder.

What the table says is kept in a mapped index, so that its size costs memory once a machine and not once a process.
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

TABLE_VERSION = 2  # of what the index holds
DEFAULT_FIELDS = Fields(image=("image",), captions=(("caption", 1.0),))
TABS = re.compile(r"\.tsv(\.\w+)?$", re.IGNORECASE)
ROWS_AT_ONCE = 4_096  # written to the disk
EXAMPLES = 3  # of each kind of bad row
KARPATHY_KEYS = {"filename", "filepath", "split", "sentences"}
MOST_KEYS = 1_000  # of JSON objects, that are named


class Row(NamedTuple):
    """Where an image is, seen from the table's folder, and what is said of it; or ``problem``: a reason and a text."""

    image: str
    captions: list[str]
    weights: list[float]
    label: str
    problem: tuple[str, str] | None = None


# The rows of one file; what of it is not used goes into the counter, a line each.
Part = Callable[[Counter], Iterable[Row]]


class TableSource:
    """Pairs by the rows of an index; images are read when they are asked for.

    Args:
      roots: the folder of each file, from which the paths of its images start.
      index: ``rows`` uint8, packed one after the other; ``ends`` int64 ``[rows]`` of each; ``files`` int64 ``[files]``,
        the number of rows up to the end of each file.
      notes: lines on what is not used, next to those that the index has.
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

    def said(self, index: int) -> tuple[str, list[str], str]:
        """Label, captions and the image's path, without reading the image; raises PairError as ``__getitem__``."""
        row = self._row(index)
        return row.label, row.captions, self._path(index, row)

    def __getitem__(self, index: int) -> Pair:
        row = self._row(index)
        path = self._path(index, row)
        try:
            image = read_whole(path)
        except ShardError:
            raise
        except Exception as error:  # a name may be anything
            reason = getattr(error, "strerror", None) or one_line(error)
            message = reason if reason.startswith(path) else f"{path}: {reason}"
            raise PairError(message, "unreadable_file") from None
        return Pair(image, row.captions, path, row.label, row.weights)

    def notes(self) -> list[str]:
        notes = count_files(self._index.meta["notes"], len(self._roots))
        for reason, (count, examples) in self._index.meta["bad"].items():
            notes.append(f"bad rows in all files: {reason} {count:,}, such as {'; '.join(examples)}")
        return [*self._notes, *notes]

    def fingerprint(self) -> str:
        return self._index.meta["fingerprint"]


def open_rows(
    name: str,
    what: object,
    roots: Sequence[str],
    parts: Sequence[Part],
    folder: str = "",
    also: object = None,
    notes: Sequence[str] = (),
) -> TableSource:
    """The source of the rows of these files.

    Args:
      name: of the source, for the index.
      what: changes whenever the rows do.
      roots: see :class:`TableSource`.
      parts: what gives the rows of each file, if they are not in the index.
      folder: of the index; empty for the default.
      also: part of what the data are, next to the rows.
      notes: see :class:`TableSource`.
    """

    def build(_) -> Tables:
        # A file without a name rather than memory: a table may be larger than that.
        with tempfile.TemporaryFile() as blob:
            return _tables(parts, blob, also)

    names = digest(name, *roots)
    return TableSource(roots, open_or_build("table", names, digest(TABLE_VERSION, what), folder, build), notes)


def _tables(parts: Sequence[Part], blob: BinaryIO, also: object) -> Tables:
    found, waiting = hashlib.sha256(json.dumps(also).encode()), []
    ends, files, size = array.array("q"), array.array("q"), 0
    notes, bad = Counter(), {}

    def write() -> None:
        data = b"".join(waiting)
        found.update(data)
        blob.write(data)
        waiting.clear()

    for part in parts:
        said = Counter()
        for row in part(said):
            packed, problem = _pack(row)
            if problem:
                count, examples = bad.get(problem[0], (0, []))
                bad[problem[0]] = (count + 1, [*examples, problem[1]][:EXAMPLES])
            waiting.append(packed)
            size += len(packed)
            ends.append(size)
            if len(waiting) == ROWS_AT_ONCE:
                write()
        files.append(len(ends))
        notes.update(said.keys())
    write()
    blob.flush()
    rows = np.memmap(blob, np.uint8, mode="r", shape=(size,)) if size else np.zeros(0, np.uint8)
    arrays = {"ends": np.array(ends, np.int64), "files": np.array(files, np.int64), "rows": rows}
    return Tables({"fingerprint": found.hexdigest()[:16], "notes": notes, "bad": bad}, arrays)


def _pack(row: Row) -> tuple[bytes, tuple[str, str] | None]:
    try:
        return msgpack.packb(row), row.problem
    except UnicodeEncodeError:
        text = row.problem[1] if row.problem else row.image
        problem = ("damaged_record", f"{text!a} has a text with half a character")
        return msgpack.packb(Row("", [], [], "", problem)), problem


def open_karpathy(where: str) -> TableSource:
    """Karpathy's annotations of Flickr30k and COCO: one JSON file of images with their sentences, in splits.

    ``split`` picks one of ``train``, ``restval``, ``val`` and ``test`` (else all are taken), ``images`` names the
    folder of the images (else that of the file).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not as that format is, or has nothing of that split.
    """
    place, options = split_options(where)
    sentences = Fields((), (("sentences", 1.0),))
    fields, others = parse_fields(options, sentences, f"karpathy:{where}", also=("index", "split", "images"))
    now, split = stamp(place), others.get("split", "")
    root = others.get("images") or os.path.dirname(os.path.abspath(place))
    text = read_text(place)
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
        raise ValueError(f"{place} is not Karpathy's JSON of images with sentences: {type(error).__name__}") from None
    if not found:
        raise ValueError(f"{place} has no images of the split {split!r}")

    others_found = Counter(str(entry["split"]) for entry in entries if split not in ("", entry["split"]))
    notes = [f"not used: {count:,} images of the split {name}" for name, count in others_found.items()]
    keys = Counter(key for entry in entries for key in entry)
    unread = [f"{key} ({count:,})" for key, count in keys.items() if key not in KARPATHY_KEYS]
    notes += [f"not used: entries {name_some(unread)}"] * bool(unread)

    def rows(_: Counter) -> Iterator[Row]:
        for path, texts in found:
            yield make_row(path, f"{place}, {path}", fields, lambda _, texts=texts: texts)

    what = [list(now), split, repr(fields)]
    return open_rows("karpathy", what, [root], [rows], others.get("index", ""), notes=notes)


def open_table(kind: str, where: str) -> TableSource:
    """Rows of CSVs or TSVs with a header, or objects of JSON lines; ``kind`` is csv, tsv or jsonl.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a column is missing, a file cannot be read as what it should be, or there are no rows.
    """
    place, options = split_options(where)
    fields, others = parse_fields(options, DEFAULT_FIELDS, f"{kind}:{where}", also=("index",))
    if len(fields.image) > 1:
        raise ValueError(f"{kind}:{where}: image={','.join(fields.image)} must be one column")
    paths = expand(place)
    stamps = [list(stamp(path)) for path in paths]
    roots = [path.rpartition("/")[0] if is_remote(path) else os.path.dirname(os.path.abspath(path)) for path in paths]

    def part(path: str) -> Part:
        def rows(notes: Counter) -> Iterator[Row]:
            read = _json_table(path, fields, notes) if kind == "jsonl" else _delimited_table(kind, path, fields, notes)
            for line, values, problem in read:
                name = f"{path}, line {line}"
                if problem:
                    yield Row("", [], [], "", (problem[0], f"{name}: {problem[1]}"))
                    continue
                yield _table_row(name, fields, nested(values, name))

        return rows

    what, also = [stamps[0], repr(fields)], None  # of one file as before there could be several
    if len(paths) > 1:
        what, also = [stamps, repr(fields)], _apart(paths)
    names = ",".join(map(os.path.basename, paths))
    name = f"{kind} {names}"
    source = open_rows(name, what, roots, [part(path) for path in paths], others.get("index", ""), also)
    if not len(source):
        raise ValueError(f"{', '.join(paths)} has no rows")
    return source


def _apart(paths: Sequence[str]) -> list[str]:
    """The paths without the folders that all are in: the same wherever those are."""
    names = [path.split("/") for path in paths]
    shared = next((depth for depth, found in enumerate(zip(*names, strict=False)) if len(set(found)) > 1), 0)
    return ["/".join(name[shared:]) for name in names]


def _table_row(name: str, fields: Fields, get: Callable[[str], object]) -> Row:
    try:
        image = get(fields.image[0])
    except PairError as error:
        return Row("", [], [], "", (error.reason, str(error)))
    if not isinstance(image, str) or not image.strip():
        return Row("", [], [], "", ("no_picture", f"{name}: the {fields.image[0]} is empty"))
    return make_row(image.strip(), name, fields, get)


def make_row(image: str, name: str, fields: Fields, get: Callable[[str], object]) -> Row:
    """The row of an image whose captions and class ``get`` gives by field."""
    try:
        captions, weights = fields.captions_of(get, name)
        return Row(image, captions, weights, fields.label_of(get))
    except PairError as error:
        return Row(image, [], [], "", (error.reason, str(error)))


def _delimited_table(kind: str, path: str, fields: Fields, notes: Counter) -> Iterator[TextRow]:
    """The rows of a CSV or TSV after its header; ``csv:`` reads files called .tsv with tabs, and quotes as in a CSV.

    Raises:
      ValueError: a column is missing, or there are two of its name.
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
            raise ValueError(f"{path} has {columns.count(column)} columns {column!r}; name them apart")
    quoted = 0
    if kind == "csv":
        yield from rows
    for row in rows:
        yield row
        quoted += any(value[:1] == '"' == value[-1:] and len(value) > 1 for value in row.values.values())
    notes.update(column_notes(columns, fields))
    if quoted:
        notes[f"{quoted:,} rows have values in quotes, which stay; to take them off as CSV does, write csv:{path}"] += 1


def _json_table(path: str, fields: Fields, notes: Counter) -> Iterator[TextRow]:
    keys: dict[str, None] = {}
    for row in json_rows(path):
        yield row
        if not row.values.keys() <= keys.keys() and len(keys) < MOST_KEYS:
            keys |= dict.fromkeys(row.values)
    notes.update(column_notes(keys, fields, "entries"))


def read_text(file: str) -> str:
    """The text of a file, which may be compressed. Raises ValueError for what is not UTF-8, OSError."""
    try:
        with open_text(file) as opened:
            return opened.read().decode("utf-8-sig")  # some programs put a byte order mark before UTF-8
    except CompressedDataError as error:
        raise ValueError(f"{file}: the compressed data are damaged: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from None
