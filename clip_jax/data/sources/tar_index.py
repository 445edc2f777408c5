"""Where each record of a WebDataset shard lies: the run of tar members that share a key.

A record is one 64-bit number: the block of its first header (38 bits; a block is 512 bytes), how many blocks it takes
(23 bits, 4 GiB) and what is wrong with it (3 bits).
"""

import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

BLOCK = tarfile.BLOCKSIZE
START_BITS, LENGTH_BITS = 38, 23
PROBLEMS = ("", "duplicate_key", "truncated_file", "unsafe_name", "too_large")

# Of a header (POSIX 1003.1-1988, and GNU's variant): name, size in octal digits, kind, magic, start of a long name.
NAME, SIZE, KIND, MAGIC, PREFIX = slice(0, 100), slice(124, 136), 156, slice(257, 265), slice(345, 500)
USTAR, GNU = b"ustar\x0000", b"ustar  \x00"
PLAIN_FILES = (b"0"[0], 0)
FOLDER = b"5"[0]
CUT_BETWEEN = "the mark of its end is missing, as if it had been cut between two files"
EXTENDED = b"x"[0]  # a header about the next one, as Python's tarfile writes for each file with a time in fractions
SPOKEN_FOR = (b" path=", b" size=", b" GNU.sparse")  # what of it would change a file's name or place


class Member(NamedTuple):
    """A plain file in a tar; ``start``, ``data`` and ``end`` are bytes: of its first header, its contents, its end."""

    name: str
    start: int
    data: int
    size: int

    @property
    def end(self) -> int:
        return self.data + -(-self.size // BLOCK) * BLOCK


def pack(start: int, length: int, problem: int) -> int:
    """Blocks into the number of a record."""
    return problem << (START_BITS + LENGTH_BITS) | length << START_BITS | start


def unpack(record: int) -> tuple[int, int, str]:
    """Start and length in bytes, and the problem, or an empty text."""
    start = record & ((1 << START_BITS) - 1)
    length = record >> START_BITS & ((1 << LENGTH_BITS) - 1)
    return start * BLOCK, length * BLOCK, PROBLEMS[record >> (START_BITS + LENGTH_BITS)]


class ShardIndex(NamedTuple):
    """``records`` uint64 ``[records]``; ``checksum`` of headers and of a sample of the contents, hexadecimal;
    ``problem`` is what was found if the file is damaged or ends too early, else empty."""

    records: np.ndarray
    checksum: str
    problem: str


def split_name(name: str) -> tuple[str, str] | None:
    """WebDataset's key and field: at the first dot after the last slash; the field in lower case.

    None for what WebDataset passes over: no dot, nothing before it, or a name such as ``__meta__``.
    """
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot <= base or (name.startswith("__") and name.endswith("__")):
        return None
    return name[:dot], name[dot + 1 :].lower()


def index_shard(data: np.ndarray | bytes) -> ShardIndex:
    """All records of a tar file.

    Args:
      data: uint8 ``[bytes]``, or the same as bytes; may be mapped, since hardly more than the headers is looked at.
    """
    data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    headers = _find_headers(data)
    records = None if headers is None else _plain_records(headers)
    if records is not None:
        problem = "" if headers.ends[-1] + BLOCK <= len(data) else CUT_BETWEEN
        return ShardIndex(records, _checksum(data, headers.data_starts), problem)
    members, problem = _members_by_tarfile(data)
    end = members[-1].end if members else 0
    if end > len(data):
        problem = f"{members[-1].name} ends {end - len(data):,} bytes after the file"
    elif not problem and len(data) % BLOCK and np.any(data[-(len(data) % BLOCK) :]):
        problem = "the file ends within a header"
    found = list(_records(members, len(data)))
    if problem and not (found and unpack(found[-1])[2] == "truncated_file"):
        # What follows is lost, and counts as one bad record: a shard that shrank must not pass for a whole one.
        found.append(pack(len(data) // BLOCK, 0, PROBLEMS.index("truncated_file")))
    if members and not problem and end + BLOCK > len(data):
        problem = CUT_BETWEEN
    starts = np.array([member.data for member in members], np.int64)
    return ShardIndex(np.array(found, np.uint64), _checksum(data, starts), problem)


def _checksum(data: np.ndarray, data_starts: np.ndarray) -> str:
    """Of each header, whose time alone tells most rewritten shards, and of one content in sixteen."""
    blocks = data[: len(data) // BLOCK * BLOCK].reshape(-1, BLOCK)
    starts = data_starts // BLOCK
    looked_at = np.concatenate([starts - 1, starts[::16]])
    return f"{zlib.crc32(blocks[looked_at[looked_at < len(blocks)]]):08x}"


class _Headers(NamedTuple):
    """Of each plain file of a tar: ``names`` uint8 ``[files, 100]``; ``starts``, ``data_starts`` and ``ends`` int64."""

    names: np.ndarray
    starts: np.ndarray
    data_starts: np.ndarray
    ends: np.ndarray


def _find_headers(data: np.ndarray) -> _Headers | None:
    """The files of a tar, found all at once by the magic word of each header.

    None if the headers so found do not follow one another exactly to the end of the file, or leave something to others,
    as with long names, sizes over 8 GiB, or a picture that holds what looks like a header.
    """
    blocks = data[: len(data) // BLOCK * BLOCK].reshape(-1, BLOCK)
    # The first letter alone first: one byte of a block tells most of them apart.
    candidates = np.flatnonzero(blocks[:, MAGIC.start] == USTAR[0])
    headers = blocks[candidates]
    magic = np.ascontiguousarray(headers[:, MAGIC]).view("S8").ravel()
    posix = magic == USTAR
    is_header = posix | (magic == GNU.rstrip(b"\0"))
    candidates, headers, posix = candidates[is_header], headers[is_header], posix[is_header]
    if not len(candidates) or len(data) % BLOCK or np.any(posix & (headers[:, PREFIX.start] != 0)):
        return None
    digits = headers[:, SIZE][:, :11].astype(np.int64) - ord("0")
    ends_well = np.isin(headers[:, SIZE.stop - 1], (0, ord(" ")))
    kinds = headers[:, KIND]
    plain = np.isin(kinds, (*PLAIN_FILES, FOLDER, EXTENDED)).all() and kinds[-1] != EXTENDED
    if not plain or not ends_well.all() or digits.min() < 0 or digits.max() > 7:
        return None
    sizes = digits @ 8 ** np.arange(10, -1, -1)
    following = candidates + 1 + -(-sizes // BLOCK)
    whole = candidates[0] == 0 and np.array_equal(following[:-1], candidates[1:]) and following[-1] <= len(blocks)
    # After the last file: the end of the file, or a block of zeros.
    if not whole or (following[-1] < len(blocks) and np.any(blocks[following[-1]])):
        return None
    extended = kinds == EXTENDED
    if extended.any():
        told = blocks[candidates[extended] + 1]
        if sizes[extended].max() > BLOCK or np.any(extended[:-1] & extended[1:]) or _speaks_for_file(told.tobytes()):
            return None
    starts = np.where(np.roll(extended, 1), np.roll(candidates, 1), candidates)
    files = np.isin(kinds, PLAIN_FILES)
    if not files.any():
        return None
    return _Headers(
        headers[files, NAME], starts[files] * BLOCK, (candidates[files] + 1) * BLOCK, following[files] * BLOCK
    )


def _speaks_for_file(extended: bytes) -> bool:
    return any(word in extended for word in SPOKEN_FOR)


def _plain_records(headers: _Headers) -> np.ndarray | None:
    """What :func:`_records` gives, for all files at once; None where a name, or a field that comes twice, is for that.

    Keys and fields are compared as sums of their bytes times random numbers of 64 bits.
    """
    length = np.argmin(headers.names, axis=1)[:, None]  # to the first zero; a name of 100 bytes has none
    if np.take_along_axis(headers.names, length, axis=1).any():
        return None
    place = np.arange(int(length.max()) + 1)
    names = np.where(place < length, headers.names[:, : len(place)], 0)
    slash = np.where(names == ord("/"), place, -1).max(axis=1)
    dots = (names == ord(".")) & (place > slash[:, None])
    dot = np.where(dots.any(axis=1), dots.argmax(axis=1), -1)
    odd = np.any((names[:, :-1] == ord(".")) & (names[:, 1:] == ord(".")))  # perhaps "../"
    odd |= np.isin(names[:, 0], (0, ord("/"), ord("_"))).any() or names.max() > 127  # perhaps "__meta__"
    if odd:
        return None
    named = dot > slash + 1
    if not named.any():
        return None
    names, dot = names[named], dot[named, None]
    names = np.where((names >= ord("A")) & (names <= ord("Z")) & (place > dot), names + 32, names)  # fields' case
    factors = np.random.default_rng(0).integers(2**64, size=len(place), dtype=np.uint64)
    keys = np.where(place < dot, names, 0).astype(np.uint64) @ factors
    fields = np.where(place > dot, names, 0).astype(np.uint64) @ factors
    first = np.concatenate([[True], (keys[1:] != keys[:-1]) | (dot[1:, 0] != dot[:-1, 0])])
    group = np.cumsum(first) - 1
    order = np.lexsort((fields, group))
    if np.any((group[order][1:] == group[order][:-1]) & (fields[order][1:] == fields[order][:-1])):
        return None
    start = headers.starts[named][first] // BLOCK
    end = headers.ends[named][np.append(np.flatnonzero(first)[1:] - 1, len(first) - 1)] // BLOCK
    if start[-1] >= 1 << START_BITS or (end - start).max() >= 1 << LENGTH_BITS:
        return None
    _, seen_first = np.unique(keys[first], return_index=True)
    problem = np.full(len(start), PROBLEMS.index("duplicate_key"), np.uint64)
    problem[seen_first] = 0
    return (
        problem << np.uint64(START_BITS + LENGTH_BITS)
        | (end - start).astype(np.uint64) << np.uint64(START_BITS)
        | start.astype(np.uint64)
    )


def _members_by_tarfile(data: np.ndarray) -> tuple[list[Member], str]:
    """The same by the standard library, which knows every variant; and what it says where it cannot go on."""
    found, end = [], 0
    try:
        with tarfile.open(fileobj=_Reader(data), mode="r:") as tar:
            for entry in tar:
                if entry.size < 0 or tar.offset <= end:  # tarfile would go back, and for ever
                    return found, f"the header at byte {entry.offset:,} has a size that cannot be"
                end = tar.offset
                if entry.isreg() and not entry.issparse():
                    found.append(Member(entry.name, entry.offset, entry.offset_data, entry.size))
                tar.members = []  # tarfile would keep all
            end = tar.offset
    except Exception as error:  # whatever a hostile header provokes
        return found, " ".join(str(error).split()) or type(error).__name__
    # tarfile takes a damaged header in the middle for the end.
    rest = data[end : end + BLOCK]
    return found, f"no header at byte {end:,}" if np.any(rest) else ""


class _Reader(io.RawIOBase):
    """Mapped bytes as a file, of which only what is asked for, and is there, takes memory."""

    def __init__(self, data: np.ndarray):
        self._data, self._place = data, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: len(self._data)}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        end = len(self._data) if size < 0 else min(self._place + size, len(self._data))
        piece = self._data[self._place : end].tobytes()
        self._place += len(piece)
        return piece


def _records(members: Iterable[Member], size: int) -> Iterator[int]:
    """Runs of neighbours with one key, as numbers; a field that comes twice begins another record."""
    keys: set[str] = set()
    key, fields, start, end, problem = None, set(), 0, 0, 0

    def record() -> int:
        length = (end - start) // BLOCK
        if start // BLOCK >= 1 << START_BITS or length >= 1 << LENGTH_BITS:
            return pack(min(start // BLOCK, (1 << START_BITS) - 1), 0, PROBLEMS.index("too_large"))
        return pack(start // BLOCK, length, problem)

    for member in members:
        parts = split_name(member.name)
        if parts is None:
            continue
        member_key, field = parts
        if member_key != key or field in fields:
            if key is not None:
                yield record()
            key, fields, start = member_key, set(), member.start
            problem = PROBLEMS.index("duplicate_key") if key in keys else 0
            if member.name.startswith("/") or (".." in member.name and ".." in member.name.split("/")):
                problem = PROBLEMS.index("unsafe_name")
            keys.add(key)
        fields.add(field)
        end = member.end
        if end > size:
            problem = PROBLEMS.index("truncated_file")
    if key is not None:
        yield record()


def read_record(data: bytes) -> tuple[str, dict[str, bytes]]:
    """The key of a record, as :func:`index_shard` found it, and its contents by field.

    Raises:
      tarfile.TarError: this is no longer the record that was indexed.
    """
    try:
        named = [(split_name(name), content) for name, content in _read_members(data)]
    except (ValueError, OverflowError, EOFError) as error:
        raise tarfile.ReadError(str(error)) from None
    fields = {parts[1]: content for parts, content in named if parts}
    keys = {parts[0] for parts, _ in named if parts}
    if len(keys) != 1:
        raise tarfile.ReadError(f"files of {len(keys)} keys where one was")
    return keys.pop(), fields


def _read_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    place = 0
    while place < len(data):
        header = data[place : place + BLOCK]
        kind, digits = header[KIND], header[SIZE].rstrip(b"\0 ")
        plain = header[MAGIC] in (USTAR, GNU) and digits.isdigit() and not header[PREFIX.start]
        size, start = int(digits, 8) if plain else 0, place + BLOCK
        if kind == EXTENDED and plain and not _speaks_for_file(data[start : start + size]):
            place = start + -(-size // BLOCK) * BLOCK
            continue
        if kind == FOLDER and plain:
            place = start
            continue
        if kind not in PLAIN_FILES or not plain:
            yield from _read_by_tarfile(data[place:])
            return
        yield header[NAME].partition(b"\0")[0].decode("utf-8", "surrogateescape"), data[start : start + size]
        place = start + -(-size // BLOCK) * BLOCK


def _read_by_tarfile(data: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for entry in tar:
            if entry.isreg():
                yield entry.name, tar.extractfile(entry).read()
