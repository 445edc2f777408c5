"""Where each record of a WebDataset shard lies: the run of tar members that share a key.

A record is one 64-bit number: the block of its first header (38 bits; a block is 512 bytes), how many blocks it takes
(23 bits, 4 GiB) and what is wrong with it (3 bits).
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from clip_jax.data.sources.tar_members import (
    BLOCK,
    EXTENDED,
    FOLDER,
    GNU,
    KIND,
    MAGIC,
    NAME,
    PLAIN_FILES,
    PREFIX,
    SIZE,
    USTAR,
    Damage,
    Member,
    members_by_tarfile,
    speaks_for_file,
    split_name,
)

START_BITS, LENGTH_BITS = 38, 23
PROBLEM_SHIFT = START_BITS + LENGTH_BITS
PROBLEMS = ("", "duplicate_key", "truncated_file", "unsafe_name", "too_large")

CUT_BETWEEN = "the mark of its end is missing, as if it had been cut between two files"
MOST_KINDS = 100  # of contents, of one shard
OTHERS = "/others"
MOST_GAPS = 1_000  # between archives in one file, that are looked at all at once


def pack(start: int, length: int, problem: int) -> int:
    """Blocks into the number of a record."""
    return problem << PROBLEM_SHIFT | length << START_BITS | start


def unpack(record: int) -> tuple[int, int, str]:
    """Start and length in bytes, and the problem, or an empty text."""
    start = record & ((1 << START_BITS) - 1)
    length = record >> START_BITS & ((1 << LENGTH_BITS) - 1)
    return start * BLOCK, length * BLOCK, PROBLEMS[record >> PROBLEM_SHIFT]


class ShardIndex(NamedTuple):
    """``records`` uint64 ``[records]``; ``checksum`` of headers and of a sample of the contents, hexadecimal;
    ``problem`` is what was found if the file is damaged or ends too early, else empty. ``contents`` counts the records
    without a problem by their fields, as ``jpg/json/txt``, and what gives no record by its kind after a ``/``."""

    records: np.ndarray
    checksum: str
    problem: str
    contents: dict[str, int]


def passed_over(name: str) -> str:
    """The kind of a name that :func:`split_name` gives None for."""
    base = name[name.rfind("/") + 1 :]
    if name.startswith("__") and name.endswith("__"):
        return "/called __NAME__"
    return "/hidden" if base.startswith(".") else "/without an ending"


def index_shard(data: np.ndarray | bytes) -> ShardIndex:
    """All records of a tar file, or of several that were written one after the other (``cat a.tar b.tar``).

    Args:
      data: uint8 ``[bytes]``, or the same as bytes; may be mapped, since hardly more than the headers is looked at.
    """
    data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    headers = _find_headers(data)
    found = None if headers is None else _plain_records(headers)
    if found is not None:
        problem = "" if headers.ends[-1] + BLOCK <= len(data) else CUT_BETWEEN
        return ShardIndex(found[0], _checksum(data, headers.data_starts), problem, most_common(found[1]))
    members, contents, damage = members_by_tarfile(data)
    end = members[-1].end if members else 0
    if end > len(data):
        damage = Damage(f"{members[-1].name} ends {end - len(data):,} bytes after the file", members[-1].start)
    elif not damage.text and len(data) % BLOCK and np.any(data[-(len(data) % BLOCK) :]):
        damage = Damage("the file ends within a header", len(data) - len(data) % BLOCK)
    records = list(_records(members, len(data), contents))
    problem = damage.text
    if problem and not (records and unpack(records[-1])[2] == "truncated_file"):
        # What follows is lost, and counts as one bad record: a shard that shrank must not pass for a whole one.
        records.append(pack(min(damage.place // BLOCK, (1 << START_BITS) - 1), 0, PROBLEMS.index("truncated_file")))
    if members and not problem and end + BLOCK > len(data):
        problem = CUT_BETWEEN
    starts = np.array([member.data for member in members], np.int64)
    return ShardIndex(np.array(records, np.uint64), _checksum(data, starts), problem, most_common(contents))


def most_common(contents: Counter) -> dict[str, int]:
    """The counts of the most frequent kinds of contents, and the sum of all others as one kind."""
    found = dict(contents.most_common(MOST_KINDS))
    if rest := contents.total() - sum(found.values()):
        found[OTHERS] = found.get(OTHERS, 0) + rest
    return found


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
    as with long names, sizes over 8 GiB, or an image that holds what looks like a header.
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
    whole = candidates[0] == 0 and following[-1] <= len(blocks) and _only_zeros_between(blocks, candidates, following)
    extended = kinds == EXTENDED
    if not whole or np.any(extended[:-1] & (following[:-1] != candidates[1:])):
        return None
    if extended.any():
        told = blocks[candidates[extended] + 1]
        if sizes[extended].max() > BLOCK or np.any(extended[:-1] & extended[1:]) or speaks_for_file(told.tobytes()):
            return None
    starts = np.where(np.roll(extended, 1), np.roll(candidates, 1), candidates)
    files = np.isin(kinds, PLAIN_FILES)
    if not files.any():
        return None
    return _Headers(
        headers[files, NAME], starts[files] * BLOCK, (candidates[files] + 1) * BLOCK, following[files] * BLOCK
    )


def _only_zeros_between(blocks: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> bool:
    """Whether members follow one another, but for the blocks of zeros that end an archive, which another may follow."""
    nexts = np.append(starts[1:], len(blocks))
    gaps = np.flatnonzero(ends != nexts)
    if len(gaps) > MOST_GAPS or np.any(ends > nexts):
        return False
    return not any(blocks[ends[gap] : nexts[gap]].any() for gap in gaps.tolist())


def _plain_records(headers: _Headers) -> tuple[np.ndarray, Counter] | None:
    """What :func:`_records` gives, for all files at once, and what it counts.

    None where a name, or a field that comes twice, is for that.

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
    contents = Counter(passed_over(name.tobytes().rstrip(b"\0").decode()) for name in names[~named])
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
    contents += _combinations(names, dot[:, 0], fields, np.flatnonzero(first), problem == 0)
    records = (
        problem << np.uint64(PROBLEM_SHIFT)
        | (end - start).astype(np.uint64) << np.uint64(START_BITS)
        | start.astype(np.uint64)
    )
    return records, contents


def _combinations(
    names: np.ndarray, dots: np.ndarray, fields: np.ndarray, first: np.ndarray, good: np.ndarray
) -> Counter:
    """How many of the good records have the same fields.

    Args:
      names: uint8 ``[files, length]``.
      dots: int64 ``[files]``, where the field begins.
      fields: uint64 ``[files]``, a sum for each field, which may differ where the dot does.
      first: int64 ``[records]``, the first file of each.
      good: bool ``[records]``.
    """
    sums = np.add.reduceat(fields, first)  # whatever the order
    _, examples, counts = np.unique(sums[good], return_index=True, return_counts=True)
    ends, rows, found = np.append(first[1:], len(names)), np.flatnonzero(good), Counter()
    for example, count in sorted(zip(examples.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1]):
        if len(found) > MOST_KINDS:
            found[OTHERS] += count
            continue
        files = range(first[rows[example]], ends[rows[example]])
        kinds = sorted(
            names[file, dots[file] + 1 :].astype(np.uint8).tobytes().rstrip(b"\0").decode() for file in files
        )
        found["/".join(kinds)] += count
    return found


def _records(members: Iterable[Member], size: int, contents: Counter) -> Iterator[int]:
    """Runs of neighbors with one key, as numbers; a field that comes twice begins another record.

    ``contents`` counts them as :class:`ShardIndex` does.
    """
    keys: set[str] = set()
    key, fields, start, end, problem = None, set(), 0, 0, 0

    def record() -> int:
        length = (end - start) // BLOCK
        if start // BLOCK >= 1 << START_BITS or length >= 1 << LENGTH_BITS:
            return pack(min(start // BLOCK, (1 << START_BITS) - 1), 0, PROBLEMS.index("too_large"))
        if not problem:
            contents["/".join(sorted(fields))] += 1
        return pack(start // BLOCK, length, problem)

    for member in members:
        parts = split_name(member.name)
        if parts is None:
            contents[passed_over(member.name)] += 1
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
