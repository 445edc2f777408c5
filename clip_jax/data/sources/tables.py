"""Pairs whose pictures are files of their own: named by a table or an annotation file, or found in a folder.

What the table says is kept in a mapped index, so that its size costs memory once a machine and not once a process.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import msgpack
import numpy as np

from clip_jax.data.sources.base import Pair, PairError
from clip_jax.data.sources.digest import digest
from clip_jax.data.sources.fields import Fields, nested, parse_fields, split_options
from clip_jax.data.sources.files import is_remote, join, read_whole, stamp
from clip_jax.data.sources.mapped_index import MappedIndex, Tables, open_or_build

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
TABLE_VERSION = 1  # of what a row of the index holds
DEFAULT_FIELDS = Fields(image=("image",), captions=(("caption", 1.0),))


class Row(NamedTuple):
    """Where a picture is, seen from the table's folder, and what is said of it; or ``problem``: a reason and a text."""

    image: str
    captions: list[str]
    weights: list[float]
    label: str
    problem: tuple[str, str] | None = None


class TableSource:
    """Pairs by the rows of an index; pictures are read when they are asked for."""

    def __init__(self, root: str, index: MappedIndex):
        self._root, self._index = root, index
        self._read_arrays()

    def _read_arrays(self) -> None:
        self._ends, self._rows = self._index.arrays["ends"], self._index.arrays["rows"]

    def __getstate__(self) -> dict:
        return {"_root": self._root, "_index": self._index}

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

    def said(self, index: int) -> tuple[str, list[str], str]:
        """Label, captions and the image's path, without reading the image; raises PairError as ``__getitem__``."""
        row = self._row(index)
        return row.label, row.captions, row.image

    def __getitem__(self, index: int) -> Pair:
        row = self._row(index)
        path = join(self._root, row.image)
        try:
            image = read_whole(path)
        except Exception as error:  # a name may be anything, and each kind of bucket raises its own
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise PairError(f"{path}: {reason}", "unreadable_file") from None
        return Pair(image, row.captions, path, row.label, row.weights)

    def fingerprint(self) -> str:
        return self._index.meta["fingerprint"]


def _open_rows(
    name: str, what: object, root: str, rows: Callable[[], Iterable[Row]], folder: str = "", also: object = None
) -> TableSource:
    """The source of these rows; ``what`` changes whenever they do, and ``also`` is part of what the data are."""

    def build(_) -> Tables:
        packed = [_pack(row) for row in rows()]
        blob = b"".join(packed)
        meta = {"fingerprint": hashlib.sha256(json.dumps(also).encode() + blob).hexdigest()[:16]}
        ends = np.cumsum([len(row) for row in packed], dtype=np.int64)
        return Tables(meta, {"ends": ends, "rows": np.frombuffer(blob, np.uint8)})

    return TableSource(root, open_or_build("table", digest(name, root), digest(TABLE_VERSION, what), folder, build))


def _pack(row: Row) -> bytes:
    try:
        return msgpack.packb(row)
    except UnicodeEncodeError:
        problem = ("damaged_record", f"{row.image!a} has a text with half a character")
        return msgpack.packb(Row("", [], [], "", problem))


def open_folder(where: str) -> TableSource:
    """Pictures below a folder, each with a text file of the same name beside it that holds a caption a line.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a picture has no text file, or there are no pictures.
    """
    place, options = split_options(where)
    fields, others = parse_fields(options, Fields((), ()), f"folder:{where}", also=("index",))
    folder = pathlib.Path(place)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    files = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = pathlib.Path(parent) / name
            with contextlib.suppress(FileNotFoundError):  # a link to nothing
                files[path.relative_to(folder).as_posix()] = tuple(stamp(str(path)))
    pictures = sorted(name for name in files if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)
    if not pictures:
        raise ValueError(f"no pictures below {folder}: looked for {', '.join(IMAGE_SUFFIXES)}")
    texts = {name: os.path.splitext(name)[0] + ".txt" for name in pictures}
    for name, text in texts.items():
        if text not in files:
            raise ValueError(f"{folder / name} has no caption: write at least one line into {folder / text}")

    def rows() -> Iterator[Row]:
        lines = Fields((), (("its .txt", 1.0),), "", fields.templates, fields.clean)
        for name in pictures:
            found = _read_text(str(folder / texts[name])).splitlines()
            yield _row(name, str(folder / name), lines, lambda _, found=found: found)

    what = [[name, files[name][0], files[texts[name]]] for name in pictures]
    sizes = [[name, files[name][0]] for name in pictures]
    root = os.path.abspath(folder)
    return _open_rows("folder", [what, repr(fields)], root, rows, others.get("index", ""), sizes)


def open_image_folder(where: str) -> TableSource:
    """Pictures in a folder a class; the class is the folder's name, and the caption (torchvision's ImageFolder).

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it has no folders, or no pictures in them.
    """
    place, options = split_options(where)
    fields, others = parse_fields(options, Fields((), (), label="its folder"), f"image_folder:{where}", also=("index",))
    folder = pathlib.Path(place)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise ValueError(f"{folder} has no folders; it must have one for each class, with pictures in it")
    pictures = []
    for name in classes:
        files = (path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        pictures += sorted((path.relative_to(folder).as_posix(), name) for path in files)
    if not pictures:
        raise ValueError(f"no pictures below {folder}: looked for {', '.join(IMAGE_SUFFIXES)}")

    def rows() -> Iterator[Row]:
        for path, name in pictures:
            yield _row(path, str(folder / path), fields, lambda _, name=name: name)

    sizes = [[path, os.path.getsize(folder / path)] for path, _ in pictures]
    root = os.path.abspath(folder)
    return _open_rows("image_folder", [sizes, repr(fields)], root, rows, others.get("index", ""), sizes)


def open_karpathy(where: str) -> TableSource:
    """Karpathy's annotations of Flickr30k and COCO: one JSON file of pictures with their sentences, in splits.

    ``split`` picks one of ``train``, ``restval``, ``val`` and ``test`` (else all are taken), ``images`` names the
    folder of the pictures (else that of the file).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not as that format is, or has nothing of that split.
    """
    place, options = split_options(where)
    sentences = Fields((), (("sentences", 1.0),))
    fields, others = parse_fields(options, sentences, f"karpathy:{where}", also=("index", "split", "images"))
    now, split = stamp(place), others.get("split", "")
    root = others.get("images") or os.path.dirname(os.path.abspath(place))
    try:
        entries = json.loads(_read_text(place))["images"]
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
        raise ValueError(f"{place} has no pictures of the split {split!r}")

    def rows() -> Iterator[Row]:
        for path, texts in found:
            yield _row(path, f"{place}, {path}", fields, lambda _, texts=texts: texts)

    return _open_rows("karpathy", [list(now), split, repr(fields)], root, rows, others.get("index", ""))


def open_table(kind: str, where: str) -> TableSource:
    """Rows of a CSV or TSV with a header, or objects of JSON lines; ``kind`` is csv, tsv or jsonl.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a column is missing, the file cannot be read as what it should be, or it has no rows.
    """
    place, options = split_options(where)
    fields, others = parse_fields(options, DEFAULT_FIELDS, f"{kind}:{where}", also=("index",))
    if len(fields.image) > 1:
        raise ValueError(f"{kind}:{where}: image={','.join(fields.image)} must be one column")
    now = stamp(place)
    read = _read_json_lines if kind == "jsonl" else _read_csv
    root = place.rpartition("/")[0] if is_remote(place) else os.path.dirname(os.path.abspath(place))
    name = f"{kind} {os.path.basename(place)}"

    def rows() -> Iterator[Row]:
        for line, get in read(place, kind, fields):
            if isinstance(get, str):
                yield Row("", [], [], "", ("damaged_record", f"{place}, line {line}: {get}"))
                continue
            image = get(fields.image[0])
            if not isinstance(image, str) or not image.strip():
                yield Row("", [], [], "", ("no_picture", f"{place}, line {line}: the {fields.image[0]} is empty"))
            else:
                yield _row(image.strip(), f"{place}, line {line}", fields, nested(get, f"{place}, line {line}"))

    source = _open_rows(name, [list(now), repr(fields)], root, rows, others.get("index", ""))
    if not len(source):
        raise ValueError(f"{place} has no rows")
    return source


def _row(image: str, name: str, fields: Fields, get: Callable[[str], object]) -> Row:
    try:
        captions, weights = fields.captions_of(get, name)
        return Row(image, captions, weights, fields.label_of(get))
    except PairError as error:
        return Row(image, [], [], "", (error.reason, str(error)))


def _read_csv(file: str, kind: str, fields: Fields) -> Iterator[tuple[int, Callable[[str], object] | str]]:
    """Line numbers with a getter of the row's values, or with what is wrong with it."""
    csv.field_size_limit(2**31 - 1)  # the default refuses captions of 131,072 characters
    tabs = kind == "tsv" or file.endswith(".tsv")
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""), delimiter="\t" if tabs else ",")
    try:
        columns = reader.fieldnames or []
        wanted = [("image", fields.image[0]), *(("caption", field.partition(".")[0]) for field, _ in fields.captions)]
        for option, column in wanted + [("label", fields.label.partition(".")[0])] * bool(fields.label):
            if column not in columns:
                raise ValueError(
                    f"{file} has no column {column!r}, only {', '.join(columns) or 'an empty first line'}; "
                    f"name it with {kind}:{file}?{option}=..."
                )
        for row in reader:
            yield reader.line_num, row.get
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}") from None


def _read_json_lines(file: str, kind: str, fields: Fields) -> Iterator[tuple[int, Callable[[str], object] | str]]:
    """The same of JSON lines."""
    for line, text in enumerate(_read_text(file).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield line, f"no JSON: {error}"
            continue
        yield line, row.get if isinstance(row, dict) else "no object, {...}"


def _read_text(file: str) -> str:
    try:
        return read_whole(file).decode("utf-8-sig")  # some programs put a byte order mark before UTF-8
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from None
