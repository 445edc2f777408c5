"""Rows of text files, one after the other: CSV, tab-separated values and JSON lines, also compressed.

A line ends with a line feed, with or without a carriage return before it; where the first line ends with a carriage
return alone, all do. No other character ends one. What is no row is given as a text that says why, and the next line is
read as if nothing had been.
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
QUOTED_MOST = 1 << 20  # characters in quotes that go over several lines; with more, the quote was never closed
READ = 1 << 20  # bytes
PACKED_READ = 1 << 12  # bytes: they may unpack to thousands of times as many


class Line(NamedTuple):
    """A line's number from 1, its text and what ended it; or what is wrong with it, as ``problem``."""

    number: int
    text: str
    end: str = ""
    problem: str = ""


class TextRow(NamedTuple):
    """The number of a row's first line and its values by column; or ``problem``, a reason to count by and a text."""

    line: int
    values: dict[str, object]
    problem: tuple[str, str] | None = None


class CompressedDataError(ValueError):
    """Compressed data that are damaged or end too early."""


def _zstandard():
    try:
        import zstandard
    except ImportError:
        raise MissingPackageError("it is compressed by Zstandard: pip install zstandard") from None
    return zstandard.ZstdDecompressor().decompressobj()


# What a compressed file begins with, whatever its name is, and what unpacks it.
COMPRESSIONS = {
    b"\x1f\x8b": functools.partial(zlib.decompressobj, 16 + zlib.MAX_WBITS),  # 16: gzip's header and check-sum
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\x00": lzma.LZMADecompressor,
    b"\x28\xb5\x2f\xfd": _zstandard,
}


class Unpacked(io.RawIOBase):
    """What compressed data hold, of one stream after the other; what comes before damage is given.

    The readers of the standard library pass over whatever follows a stream of bzip2 or xz, and Zstandard's over a
    missing end.
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
            except Exception as error:  # each kind of compression raises its own
                raise CompressedDataError(one_line(error)) from None
            self._packed = self._unpacker.unused_data if self._unpacker.eof else b""
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size


def open_text(path: str) -> BinaryIO:
    """A file of text, unpacked, buffered; reading it raises CompressedDataError where that cannot go on.

    Raises:
      OSError: it cannot be read.
      ValueError: it is compressed in a way that is not read, or is UTF-16.
    """
    file = open_file(path)
    head = file.peek(16)[:16]
    if head.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path} is a ZIP archive; unpack it, or compress the file with gzip")
    if head.startswith(UTF_16):
        raise ValueError(f"{path} is UTF-16; save it as UTF-8")
    for magic, make_unpacker in COMPRESSIONS.items():
        # "BZh" could begin a text: after it bzip2 has a digit and its own magic.
        if head.startswith(magic) and (magic != b"BZh" or head[4:10] == b"1AY&SY"):
            try:
                return io.BufferedReader(Unpacked(file, make_unpacker), BUFFER)
            except MissingPackageError as error:
                raise MissingPackageError(f"{path}: {error}") from None
    return file


def lines_of(path: str) -> Iterator[Line]:
    """All lines; those that are not UTF-8, and what of a compressed file cannot be unpacked, as problems.

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
    """Lines with their ends."""
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
    """The header, and then a row for each line that is not blank.

    Args:
      path: the file.
      delimiter: between the values.
      quotes: whether a value that begins with ``"`` goes on to the next ``"`` that is not doubled, over delimiters and
        line ends, as in CSV (RFC 4180). Without, quotes are characters like others, as in tab-separated values.

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
    """A row for each line that is not blank.

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
    """The values of each line that is not blank, or what is wrong with it, with its number."""
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
    """Lines of which some can be put back."""

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
    """The values of a row with quotes that may go over several lines.

    A quote that is not closed, or after whose end over several lines something else follows than a delimiter, is taken
    for a character that nobody escaped: that line alone is wrong, and what it would have swallowed is put back.
    """
    text, last, taken, values, place = line.text, line, [], [], 0
    while True:
        if text[place : place + 1] != '"':
            end = text.find(delimiter, place)
            values.append(text[place:] if end < 0 else text[place:end])
            place = len(text) if end < 0 else end
        else:
            parts, start = [], place + 1
            while True:
                close = text.find('"', start)
                while close < 0:
                    following = ahead.take()
                    if following is not None:
                        taken.append(following)
                    if following is None or following.problem or len(text) - place > QUOTED_MOST:
                        ahead.put_back(taken)
                        return "a quote is opened and not closed"
                    searched = len(text)
                    text, last = text + last.end + following.text, following
                    close = text.find('"', searched)
                parts.append(text[start:close])
                if text[close + 1 : close + 2] != '"':
                    break
                parts.append('"')
                start = close + 2
            place = close + 1
            end = text.find(delimiter, place)
            end = len(text) if end < 0 else end
            if taken and end > place:
                ahead.put_back(taken)
                return "a quote is opened and not closed"
            values.append("".join(parts) + text[place:end])  # as Python's csv and pandas read '"a" b'
            place = end
        if place >= len(text):
            return values
        place += len(delimiter)
