"""Reads the rows of CSV, TSV and JSON-lines files, also compressed, and reports damaged rows without losing others.

A line ends with a line feed, or with a carriage return and a line feed. If the first line ends with a carriage return
alone, all lines do. No other character ends a line.
"""

import bz2
import csv
import functools
import io
import json
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from clip_jax.data.sources.base import MissingPackageError
from clip_jax.data.sources.files import BUFFER, open_file
from clip_jax.errors import one_line

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
MAX_QUOTED = 1 << 20  # characters of a quoted value over several lines; with more, the quote was never closed
READ = 1 << 20  # bytes
PACKED_READ = 1 << 12  # compressed bytes, which may unpack to thousands of times as many


class Line(NamedTuple):
    """A line's number from 1, its text and its line break; ``problem`` is what is wrong with it."""

    number: int
    text: str
    end: str = ""
    problem: str = ""


class TextRow(NamedTuple):
    """The number of a row's first line, and its values by column; or ``problem``: a reason and a message."""

    line: int
    values: dict[str, object]
    problem: tuple[str, str] | None = None


class CompressedDataError(ValueError):
    """Compressed data are damaged or end too early."""


def _zstandard():
    try:
        import zstandard
    except ImportError:
        raise MissingPackageError("it is compressed by Zstandard: pip install zstandard") from None
    return zstandard.ZstdDecompressor().decompressobj()


# The first bytes of a compressed file, and what unpacks it.
COMPRESSIONS = {
    b"\x1f\x8b": functools.partial(zlib.decompressobj, 16 + zlib.MAX_WBITS),  # 16: gzip's header and check-sum
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\x00": lzma.LZMADecompressor,
    b"\x28\xb5\x2f\xfd": _zstandard,
}


class Unpacked(io.RawIOBase):
    """Unpacks one compressed stream after the other, and returns all data before damage.

    The standard library's readers ignore what follows a stream of bzip2 or xz; Zstandard's ignores a missing end.
    """

    def __init__(self, file: BinaryIO, make_unpacker: Callable):
        self._file, self._make_unpacker, self._unpacker = file, make_unpacker, make_unpacker()
        self._packed, self._unpacked = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._unpacked:
            data = self._packed or self._file.read(PACKED_READ)
            if self._unpacker.eof:
                data = data.lstrip(b"\0")  # padding
                self._unpacker = self._make_unpacker() if data else self._unpacker
            if not data:
                if self._unpacker.eof and not self._file.peek(1):
                    return 0
                if not self._unpacker.eof:
                    raise CompressedDataError("the mark of their end is missing")
                self._packed = b""
                continue
            try:
                self._unpacked = self._unpacker.decompress(data)
            except Exception as error:  # each compression raises its own kinds
                raise CompressedDataError(one_line(error)) from None
            self._packed = self._unpacker.unused_data if self._unpacker.eof else b""
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size


def open_text(path: str) -> BinaryIO:
    """Opens a text file, unpacked and buffered. Reading raises CompressedDataError where the data are damaged.

    Raises:
      OSError: it cannot be read.
      ValueError: its compression is not supported, or it is UTF-16.
    """
    file = open_file(path)
    head = file.peek(16)[:16]
    if head.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path} is a ZIP archive; unpack it, or compress the file with gzip")
    if head.startswith(UTF_16):
        raise ValueError(f"{path} is UTF-16; save it as UTF-8")
    for magic, make_unpacker in COMPRESSIONS.items():
        # A text can begin with "BZh"; bzip2 has a digit and another magic after it.
        if head.startswith(magic) and (magic != b"BZh" or head[4:10] == b"1AY&SY"):
            try:
                return io.BufferedReader(Unpacked(file, make_unpacker), BUFFER)
            except MissingPackageError as error:
                raise MissingPackageError(f"{path}: {error}") from None
    return file


def lines_of(path: str) -> Iterator[Line]:
    """Yields all lines. Lines that are not UTF-8, and damaged compressed data, have a ``problem``.

    Raises:
      OSError, ValueError: as :func:`open_text`.
    """
    number = 0
    with open_text(path) as file:
        pieces = _pieces(file)
        while True:
            try:
                piece = next(pieces, None)
            except CompressedDataError as error:
                yield Line(number + 1, "", "", f"the compressed data end here, too early, or are damaged: {error}")
                return
            if piece is None:
                return
            number += 1
            if number == 1:
                piece = piece.removeprefix(BYTE_ORDER_MARK)
            yield _decoded(number, piece)


def _decoded(number: int, piece: bytes) -> Line:
    try:
        text, problem = piece.decode(), ""
        if text.endswith("\n") and "\r" not in text and "\0" not in text:
            return Line(number, text[:-1], "\n")
    except UnicodeDecodeError as error:
        text, problem = piece.decode("utf-8", "surrogateescape"), f"not UTF-8: {error.reason} at its byte {error.start}"
    if "\0" in text:
        problem = "it holds a zero byte"
    end = "\r\n" if text.endswith("\r\n") else text[-1:] if text.endswith(("\n", "\r")) else ""
    return Line(number, text[: len(text) - len(end)], end, problem)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """Yields lines with their line breaks."""
    head = file.peek(READ)
    first, feed = head.find(b"\r"), head.find(b"\n")
    carriage_returns = 0 <= first < len(head) - 1 and head[first + 1 : first + 2] != b"\n" and not 0 <= feed < first
    if not carriage_returns:
        yield from file
        return
    rest = b""
    while piece := file.read1(READ):
        *whole, rest = (rest + piece).split(b"\r")
        for line in whole:
            yield line + b"\r"
    if rest:
        yield rest


def delimited_rows(path: str, delimiter: str, quotes: bool) -> Iterator[list[str] | TextRow]:
    """Yields the header, and then a row for each line that is not blank.

    Args:
      path: the file.
      delimiter: between the values.
      quotes: whether a value that begins with ``"`` ends at the next ``"`` that is not doubled, and may contain
        delimiters and line breaks, as in CSV (RFC 4180). If not, quotes are ordinary characters, as in TSV.

    Raises:
      OSError, ValueError: as :func:`open_text`; or the header cannot be read.
    """
    header: list[str] = []
    for number, values in _split(lines_of(path), delimiter, quotes):
        if len(values) == len(header) and not isinstance(values, str):
            yield TextRow(number, dict(zip(header, values, strict=True)))
            continue
        problem = values if isinstance(values, str) else ""
        if not header:
            if problem:
                raise ValueError(f"{path}, line {number}: {problem}")
            header = values
            yield header
            continue
        if not problem and len(values) != len(header) and (len(values) < len(header) or any(values[len(header) :])):
            problem = f"{len(values):,} values for {len(header):,} columns"
        if problem:
            yield TextRow(number, {}, _problem(problem))
        else:
            yield TextRow(number, dict(zip(header, values, strict=False)))


def json_rows(path: str) -> Iterator[TextRow]:
    """Yields a row for each line that is not blank.

    Raises:
      OSError, ValueError: as :func:`open_text`.
    """
    for line in lines_of(path):
        if line.problem:
            yield TextRow(line.number, {}, _problem(line.problem))
            continue
        try:
            values = json.loads(line.text)
        except (ValueError, RecursionError) as error:
            if not line.text.strip():
                continue
            yield TextRow(line.number, {}, _problem(f"no JSON: {error}"))
            continue
        if isinstance(values, dict):
            yield TextRow(line.number, values)
        else:
            yield TextRow(line.number, {}, _problem("no object, {...}"))


def _problem(text: str) -> tuple[str, str]:
    return ("truncated_file" if text.startswith("the compressed data") else "damaged_record", text)


def _split(lines: Iterator[Line], delimiter: str, quotes: bool) -> Iterator[tuple[int, list[str] | str]]:
    """Yields the number of each line that is not blank, and its values, or what is wrong with it."""
    ahead = _Ahead(lines)
    for line in ahead:
        if line.problem:
            yield line.number, line.problem
        elif not line.text.strip(" "):
            continue
        elif not quotes or '"' not in line.text:
            yield line.number, line.text.split(delimiter)
        else:
            try:
                [values] = csv.reader([line.text], delimiter=delimiter, strict=True)
            except csv.Error:
                values = _split_quoted(line, ahead, delimiter)
            yield line.number, values


class _Ahead:
    """Iterates over lines that can be put back."""

    def __init__(self, lines: Iterator[Line]):
        self._lines, self._waiting = lines, deque()

    def __iter__(self) -> Iterator[Line]:
        while True:
            while self._waiting:
                yield self._waiting.popleft()
            for line in self._lines:
                yield line
                if self._waiting:
                    break
            else:
                if not self._waiting:
                    return

    def take(self) -> Line | None:
        return self._waiting.popleft() if self._waiting else next(self._lines, None)

    def put_back(self, lines: list[Line]) -> None:
        self._waiting.extendleft(reversed(lines))


def _split_quoted(line: Line, ahead: _Ahead, delimiter: str) -> list[str] | str:
    """Returns the values of a row with quotes, which may span several lines, or what is wrong with it.

    A quote may not be closed, or may be closed in another line before something that is not a delimiter. It is then
    taken for an unescaped character: only this line is bad, and the following lines are put back.
    """
    text, last, taken, values, start = line.text, line, [], [], 0
    while True:
        if text[start : start + 1] != '"':
            end = text.find(delimiter, start)
            values.append(text[start:] if end < 0 else text[start:end])
            start = len(text) if end < 0 else end
        else:
            parts, part_start = [], start + 1
            while True:
                close = text.find('"', part_start)
                while close < 0:
                    following = ahead.take()
                    if following is not None:
                        taken.append(following)
                    if following is None or following.problem or len(text) - start > MAX_QUOTED:
                        ahead.put_back(taken)
                        return "a quote is opened and not closed"
                    searched = len(text)
                    text, last = text + last.end + following.text, following
                    close = text.find('"', searched)
                parts.append(text[part_start:close])
                if text[close + 1 : close + 2] != '"':
                    break
                parts.append('"')
                part_start = close + 2
            start = close + 1
            end = text.find(delimiter, start)
            end = len(text) if end < 0 else end
            if taken and end > start:
                ahead.put_back(taken)
                return "a quote is opened and not closed"
            values.append("".join(parts) + text[start:end])  # as Python's csv and pandas read '"a" b'
            start = end
        if start >= len(text):
            return values
        start += len(delimiter)
