"""The members of a tar file by the standard library, which knows every variant, and those of one record from memory."""

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clip_jax.errors import one_line

BLOCK = tarfile.BLOCKSIZE
# Of a header (POSIX 1003.1-1988, and GNU's variant): name, size in octal digits, kind, magic, start of a long name.
NAME, SIZE, KIND, MAGIC, PREFIX = slice(0, 100), slice(124, 136), 156, slice(257, 265), slice(345, 500)
USTAR, GNU = b"ustar\x0000", b"ustar  \x00"
PLAIN_FILES = (b"0"[0], 0)
FOLDER = b"5"[0]
EXTENDED = b"x"[0]  # a header about the next one, as Python's tarfile writes for each file with a time in fractions
SPOKEN_FOR = (b" path=", b" size=", b" GNU.sparse")  # what of it would change a file's name or place
ZERO_BLOCKS = 1 << 16  # looked at in one go
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "Zstandard"}


class Member(NamedTuple):
    """A plain file in a tar; ``start``, ``data`` and ``end`` are bytes: of its first header, its contents, its end."""

    name: str
    start: int
    data: int
    size: int

    @property
    def end(self) -> int:
        return self.data + -(-self.size // BLOCK) * BLOCK


class Damage(NamedTuple):
    """What is wrong with a file, and the byte from which on what it holds is lost; without text, nothing."""

    text: str = ""
    place: int = 0


def members_by_tarfile(data: np.ndarray) -> tuple[list[Member], Counter, Damage]:
    """The same by the standard library, which knows every variant; what gives no record; and where it cannot go on."""
    members, passed, start = [], Counter(), 0
    while True:
        damage = _archive_by_tarfile(data, start, members, passed)
        if damage.text:
            return members, passed, damage
        end = damage.place
        rest = data[end : len(data) - len(data) % BLOCK].reshape(-1, BLOCK)
        start = end + _zero_blocks(rest) * BLOCK
        if start + BLOCK > len(data):
            return members, passed, Damage()
        try:
            tarfile.TarInfo.frombuf(data[start : start + BLOCK].tobytes(), "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            after = ", after the mark of the archive's end" if start > end else ""
            return members, passed, Damage(f"no header at byte {start:,}{after}: {error}", start)
        if start == end:
            return members, passed, Damage(f"the header at byte {start:,} cannot be read", start)


def _zero_blocks(blocks: np.ndarray) -> int:
    """How many blocks of zeros come first."""
    for start in range(0, len(blocks), ZERO_BLOCKS):
        filled = blocks[start : start + ZERO_BLOCKS].any(axis=1)
        if filled.any():
            return start + int(filled.argmax())
    return len(blocks)


def _archive_by_tarfile(data: np.ndarray, start: int, members: list[Member], passed: Counter) -> Damage:
    """Appends the members of the archive that begins there.

    Returns its end as the place, and as the text what keeps the standard library from reading on.
    """
    end = start
    try:
        with tarfile.open(fileobj=_Reader(data[start:]), mode="r:") as tar:
            for entry in tar:
                if entry.size < 0 or start + tar.offset <= end:  # tarfile would go back, and for ever
                    return Damage(f"the header at byte {start + entry.offset:,} has a size that cannot be", end)
                end = start + tar.offset
                if entry.isreg() and not entry.issparse():
                    members.append(Member(entry.name, start + entry.offset, start + entry.offset_data, entry.size))
                elif not entry.isdir():
                    passed[_kind(entry)] += 1
                tar.members = []  # tarfile would keep all
            return Damage("", start + tar.offset)
    except Exception as error:  # whatever a hostile header provokes
        if not start and (name := next((name for magic, name in COMPRESSED.items() if _begins(data, magic)), "")):
            return Damage(f"it is compressed by {name}: unpack it, since records are read in place", start)
        return Damage(one_line(error), end)


def _begins(data: np.ndarray, magic: bytes) -> bool:
    return data[: len(magic)].tobytes() == magic


def _kind(entry: tarfile.TarInfo) -> str:
    if entry.issym():
        return "/symbolic links"
    if entry.islnk():
        return "/hard links"
    return "/sparse files" if entry.issparse() else "/devices, pipes and kinds that are not known"


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


def split_name(name: str) -> tuple[str, str] | None:
    """WebDataset's key and field: at the first dot after the last slash; the field in lower case.

    None for what WebDataset passes over: no dot, nothing before it, or a name such as ``__meta__``.
    """
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot <= base or (name.startswith("__") and name.endswith("__")):
        return None
    return name[:dot], name[dot + 1 :].lower()


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
        if kind == EXTENDED and plain and not speaks_for_file(data[start : start + size]):
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


def speaks_for_file(extended: bytes) -> bool:
    return any(word in extended for word in SPOKEN_FOR)
