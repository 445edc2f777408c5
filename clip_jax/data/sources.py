"""Where pairs come from: random access by index to encoded pictures and their captions.

A source is named by one string, ``kind:where``:

=======================================  ===========================================================================
``emoji:noto,twemoji/train``             the pairs that ship: styles (noto, twemoji, openmoji), then a split (train,
                                         held_out, or all)
``array_record:/data/pairs-*``           ArrayRecord files of msgpack maps with ``image`` (bytes) and ``captions``,
                                         and, if wanted, ``key`` and ``label``
``folder:/pictures``                     pictures, each beside a ``.txt`` of the same name with a caption a line
``csv:/pairs.csv?image=path&caption=c``  a CSV, or TSV by its ending; pictures' paths are relative to the file
=======================================  ===========================================================================
"""

import csv
import glob
import hashlib
import io
import json
import pathlib
import urllib.parse
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgpack
from grain.sources import ArrayRecordDataSource

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
EMOJI_FOLDER = pathlib.Path(__file__).parent / "emoji"
EMOJI_STYLES = ("noto", "twemoji", "openmoji")
EMOJI_SPLITS = ("train", "held_out")


class Pair(NamedTuple):
    """An encoded picture, at least one caption of it, a name for it in messages, and its class if it has one."""

    image: bytes
    captions: Sequence[str]
    key: str
    label: str = ""


class PairError(ValueError):
    """A record that is no pair; the message is one line that says which and why."""


class Source(Protocol):
    """Random access to pairs. Must be picklable: worker processes get a copy."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair:
        """Raises PairError if this record is damaged."""
        ...

    def fingerprint(self) -> str:
        """A digest that changes when the pairs or their order do; two runs over equal sources see equal data."""
        ...


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class ArrayRecordSource:
    """Pairs from ArrayRecord files, in the order of the files.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is not an ArrayRecord file.
    """

    def __init__(self, paths: Sequence[str]):
        for path in paths:
            if not pathlib.Path(path).is_file():
                raise FileNotFoundError(f"no ArrayRecord file {path}")
        self._paths = list(paths)
        try:
            self._records = ArrayRecordDataSource(self._paths)
        except RuntimeError as error:
            raise ValueError(f"not ArrayRecord files: {', '.join(self._paths)}: {_first_line(error)}") from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Pair:
        try:
            record = msgpack.unpackb(self._records[index])
            pair = Pair(
                record["image"], record["captions"], record.get("key", f"record {index}"), record.get("label", "")
            )
        except Exception as error:  # msgpack and the reader raise many kinds for damaged bytes
            raise PairError(f"record {index} is damaged: {type(error).__name__}: {_first_line(error)}") from None
        captions = pair.captions
        whole = isinstance(pair.image, bytes) and captions and all(isinstance(caption, str) for caption in captions)
        if not whole:
            raise PairError(f"record {index} must have image as bytes and captions as a list of at least one text")
        return pair

    def fingerprint(self) -> str:
        return _digest([(pathlib.Path(path).name, pathlib.Path(path).stat().st_size) for path in self._paths])


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


class FileSource:
    """Pairs whose pictures are files of their own: what :func:`folder_source` and :func:`csv_source` return.

    An entry is a path below ``root`` and the captions of that picture.
    """

    def __init__(self, root: pathlib.Path, entries: Sequence[tuple[str, Sequence[str]]]):
        self._root, self._entries = root, entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Pair:
        name, captions = self._entries[index]
        path = self._root / name
        try:
            return Pair(path.read_bytes(), captions, str(path))
        except OSError as error:
            raise PairError(f"{path}: {error.strerror}") from None

    def fingerprint(self) -> str:
        return _digest([(name, list(captions)) for name, captions in self._entries])


def folder_source(folder: pathlib.Path) -> FileSource:
    """Pictures below a folder, each with a text file of the same name beside it that holds a caption a line.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a picture has no captions, or there are no pictures.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    entries = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()):
        text = path.with_suffix(".txt")
        lines = _read_text(text).splitlines() if text.is_file() else []
        captions = [line.strip() for line in lines if line.strip()]
        if not captions:
            raise ValueError(f"{path} has no caption: write at least one line into {text}")
        entries.append((path.relative_to(folder).as_posix(), captions))
    if not entries:
        raise ValueError(f"no pictures below {folder}: looked for {', '.join(IMAGE_SUFFIXES)}")
    return FileSource(folder, entries)


def _read_text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # some programs put a byte order mark before UTF-8
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from None


def csv_source(file: pathlib.Path, image: str = "image", caption: str = "caption") -> FileSource:
    """Rows of a CSV (or TSV, by its ending) with a header; ``image`` and ``caption`` name the columns.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a column is missing, a row has an empty field, or there are no rows.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    entries = []
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""), delimiter="\t" if file.suffix == ".tsv" else ",")
    try:
        columns = reader.fieldnames or []
        for name, column in (("image", image), ("caption", caption)):
            if column not in columns:
                raise ValueError(
                    f"{file} has no column {column!r}, only {', '.join(columns) or 'an empty first line'}; "
                    f"name it with csv:{file}?{name}=..."
                )
        for row in reader:
            for column in (image, caption):
                if not (row[column] or "").strip():
                    raise ValueError(f"{file}, line {reader.line_num}: the {column} is empty")
            entries.append((row[image].strip(), [row[caption].strip()]))
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}") from None
    if not entries:
        raise ValueError(f"{file} has no rows")
    return FileSource(file.parent, entries)


def _open_emoji(where: str) -> ArrayRecordSource:
    styles, _, split = where.partition("/")
    splits = EMOJI_SPLITS if split == "all" else (split,)
    unknown = [style for style in styles.split(",") if style not in EMOJI_STYLES]
    if unknown or not set(splits) <= set(EMOJI_SPLITS):
        raise ValueError(
            f"emoji:{where}: write emoji:STYLES/SPLIT with styles from {', '.join(EMOJI_STYLES)} and a split from "
            f"{', '.join(EMOJI_SPLITS)}, all"
        )
    return ArrayRecordSource(
        [str(EMOJI_FOLDER / f"{style}-{split}.array_record") for style in styles.split(",") for split in splits]
    )


def _open_array_record(where: str) -> ArrayRecordSource:
    patterns = where.split(",")
    paths = [path for pattern in patterns for path in sorted(glob.glob(pattern))]
    if not paths:
        raise FileNotFoundError(f"no ArrayRecord files match {where}")
    return ArrayRecordSource(paths)


def open_source(name: str) -> Source:
    """Opens the source that a string names (see the module's documentation).

    Raises:
      FileNotFoundError: a file or folder is missing.
      ValueError: the string or what it names is not as it should be.
    """
    kind, _, where = name.partition(":")
    openers = {
        "emoji": _open_emoji,
        "array_record": _open_array_record,
        "folder": lambda where: folder_source(pathlib.Path(where)),
        "csv": lambda where: csv_source(
            pathlib.Path(where.partition("?")[0]), **dict(urllib.parse.parse_qsl(where.partition("?")[2]))
        ),
    }
    if kind not in openers or not where:
        raise ValueError(f"{name!r} names no source: write {', '.join(f'{kind}:...' for kind in openers)}")
    try:
        return openers[kind](where)
    except TypeError:
        raise ValueError(f"{name!r}: a csv source takes ?image=COLUMN&caption=COLUMN and nothing else") from None
