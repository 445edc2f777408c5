"""Reads the members of a tar file: all of them by the standard library, or those of one record from its bytes."""

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clip_jax.errors import one_line

BLOCK = tarfile.BLOCKSIZE
# Fields of a header (POSIX 1003.1-1988 and GNU): name, size in octal digits, kind, magic, start of a long name.
NAME, SIZE, KIND, MAGIC, PREFIX = slice(0, 100), slice(124, 136), 156, slice(257, 265), slice(345, 500)
USTAR, GNU = b"ustar\x0000", b"ustar  \x00"
REGULAR_FILES = (b"0"[0], 0)
FOLDER = b"5"[0]
EXTENDED = b"x"[0]  # a header about the next one, such as Python's tarfile writes for fractional times
OVERRIDES = (b" path=", b" size=", b" GNU.sparse")  # entries that change a file's name, size or position
ZERO_BLOCKS = 1 << 16  # compared at once
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "Zstandard"}


class Member(NamedTuple):
    """A regular file in a tar: byte offsets of its first header, of its data and of its end, and its size in bytes."""

    name: str
    start: int
    data: int
    size: int

    @property
    def end(self) -> int:
        return self.data + -(-self.size // BLOCK) * BLOCK


class Damage(NamedTuple):
    """What is wrong with a file (empty: nothing), and the byte offset from which its content is lost."""

    text: str = ""
    offset: int = 0


def members_by_tarfile(data: np.ndarray) -> tuple[list[Member], Counter, Damage]:
    """Reads all members with the standard library, which supports every variant of tar.

    Args:
      data: uint8 ``[bytes]``.

    Returns:
      The regular files, the number of all other members by kind, and the damage that ended the reading.
    """
    members, other, start = [], Counter(), 0
    while True:
        damage = _archive_by_tarfile(data, start, members, other)
        if damage.text:
            return members, other, damage
        end = damage.offset
        rest = data[end : len(data) - len(data) % BLOCK].reshape(-1, BLOCK)
        start = end + _zero_blocks(rest) * BLOCK
        if start + BLOCK > len(data):
            return members, other, Damage()
        try:
            tarfile.TarInfo.frombuf(data[start : start + BLOCK].tobytes(), "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            after = ", after the archive's end marker" if start > end else ""
            return members, other, Damage(f"no header at byte {start:,}{after}: {error}", start)
        if start == end:
            return members, other, Damage(f"the header at byte {start:,} cannot be read", start)


def _zero_blocks(blocks: np.ndarray) -> int:
    """Returns the number of leading blocks of zeros."""
    for start in range(0, len(blocks), ZERO_BLOCKS):
        filled = blocks[start : start + ZERO_BLOCKS].any(axis=1)
        if filled.any():
            return start + int(filled.argmax())
    return len(blocks)


def _archive_by_tarfile(data: np.ndarray, start: int, members: list[Member], other: Counter) -> Damage:
    """Appends the members of the archive at ``start``. Returns its damage, if any, with the offset of its end."""
    end = start
    try:
        with tarfile.open(fileobj=_Reader(data[start:]), mode="r:") as tar:
            for entry in tar:
                if entry.size < 0 or start + tar.offset <= end:  # tarfile would loop forever
                    return Damage(f"the header at byte {start + entry.offset:,} has an impossible size", end)
                end = start + tar.offset
                if entry.isreg() and not entry.issparse():
                    members.append(Member(entry.name, start + entry.offset, start + entry.offset_data, entry.size))
                elif not entry.isdir():
                    other[_kind(entry)] += 1
                tar.members = []  # saves memory
            return Damage("", start + tar.offset)
    except Exception as error:  # a malicious header can raise any error
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
    return "/sparse files" if entry.issparse() else "/devices, pipes and unknown kinds"


class _Reader(io.RawIOBase):
    """Memory-mapped bytes as a file. Only the bytes that are read take memory."""

    def __init__(self, data: np.ndarray):
        self._data, self._position = data, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = len(self._data) if size < 0 else min(self._position + size, len(self._data))
        piece = self._data[self._position : end].tobytes()
        self._position += len(piece)
        return piece


def split_name(name: str) -> tuple[str, str] | None:
    """Splits a member's name into WebDataset's key and field at the first dot after the last slash.

    Returns the key and the field in lower case, or None for names that WebDataset ignores: without a dot, with nothing
    before it, or such as ``__meta__``.
    """
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot <= base or (name.startswith("__") and name.endswith("__")):
        return None
    return name[:dot], name[dot + 1 :].lower()


def read_record(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Reads a record that :func:`index_shard` found. Returns its key, and its contents by field.

    Raises:
      tarfile.TarError: this is not the record that was indexed.
    """
    try:
        named = [(split_name(name), content) for name, content in _read_members(data)]
    except (ValueError, OverflowError, EOFError) as error:
        raise tarfile.ReadError(str(error)) from None
    fields = {parts[1]: content for parts, content in named if parts}
    keys = {parts[0] for parts, _ in named if parts}
    if len(keys) != 1:
        raise tarfile.ReadError(f"it has files of {len(keys)} keys instead of one")
    return keys.pop(), fields


def _read_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    offset = 0
    while offset < len(data):
        header = data[offset : offset + BLOCK]
        kind, digits = header[KIND], header[SIZE].rstrip(b"\0 ")
        plain = header[MAGIC] in (USTAR, GNU) and digits.isdigit() and not header[PREFIX.start]
        size, start = int(digits, 8) if plain else 0, offset + BLOCK
        if kind == EXTENDED and plain and not overrides_header(data[start : start + size]):
            offset = start + -(-size // BLOCK) * BLOCK
            continue
        if kind == FOLDER and plain:
            offset = start
            continue
        if kind not in REGULAR_FILES or not plain:
            yield from _read_by_tarfile(data[offset:])
            return
        yield header[NAME].partition(b"\0")[0].decode("utf-8", "surrogateescape"), data[start : start + size]
        offset = start + -(-size // BLOCK) * BLOCK


def _read_by_tarfile(data: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for entry in tar:
            if entry.isreg():
                yield entry.name, tar.extractfile(entry).read()


def overrides_header(extended: bytes) -> bool:
    """Whether an extended header changes the name, size or position of the next file."""
    return any(word in extended for word in OVERRIDES)
