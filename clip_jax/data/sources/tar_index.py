"""Finds where each record of a WebDataset shard is stored. A record is a run of tar members with the same key.

A record becomes one 64-bit number: the block of its first header (38 bits; a block has 512 bytes), its number of blocks
(23 bits, up to 4 GiB) and its problem (3 bits).
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
    PREFIX,
    REGULAR_FILES,
    SIZE,
    USTAR,
    Damage,
    Member,
    members_by_tarfile,
    overrides_header,
    split_name,
)

START_BITS, LENGTH_BITS = 38, 23
PROBLEM_SHIFT = START_BITS + LENGTH_BITS
PROBLEMS = ("", "duplicate_key", "truncated_file", "unsafe_name", "too_large")

CUT_BETWEEN = "its end marker is missing, as if it had been cut between two files"
MAX_KINDS = 100  # of contents, per shard
OTHERS = "/others"
MAX_GAPS = 1_000  # between archives in one file, for the fast path


def pack(start: int, length: int, problem: int) -> int:
    """Returns the number of a record: ``start`` and ``length`` in blocks, ``problem`` an index of ``PROBLEMS``."""
    return problem << PROBLEM_SHIFT | length << START_BITS | start


def unpack(record: int) -> tuple[int, int, str]:
    """Returns a record's start and length in bytes, and its problem or an empty text."""
    start = record & ((1 << START_BITS) - 1)
    length = record >> START_BITS & ((1 << LENGTH_BITS) - 1)
    return start * BLOCK, length * BLOCK, PROBLEMS[record >> PROBLEM_SHIFT]


class ShardIndex(NamedTuple):
    """The records of a shard.

    Attributes:
      records: uint64 ``[records]``, see :func:`pack`.
      checksum: of the headers and of a sample of the contents, hexadecimal.
      problem: how the file is damaged; empty if it is not.
      contents: number of good records by their fields, such as ``jpg/json/txt``, and of unused members by their kind,
        such as ``/hidden``.
    """

    records: np.ndarray
    checksum: str
    problem: str
    contents: dict[str, int]


def kind_of_unused(name: str) -> str:
    """Returns the kind of a name for which :func:`split_name` returns None."""
    base = name[name.rfind("/") + 1 :]
    if name.startswith("__") and name.endswith("__"):
        return "/called __NAME__"
    return "/hidden" if base.startswith(".") else "/without a dot"


def index_shard(data: np.ndarray | bytes) -> ShardIndex:
    """Returns all records of a tar file, also of several joined files (``cat a.tar b.tar``).

    Args:
      data: uint8 ``[bytes]``, or bytes. It may be memory-mapped: little more than the headers is read.
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
        # What follows is lost and counts as one bad record, so that a shard that was cut is noticed.
        records.append(pack(min(damage.offset // BLOCK, (1 << START_BITS) - 1), 0, PROBLEMS.index("truncated_file")))
    if members and not problem and end + BLOCK > len(data):
        problem = CUT_BETWEEN
    starts = np.array([member.data for member in members], np.int64)
    return ShardIndex(np.array(records, np.uint64), _checksum(data, starts), problem, most_common(contents))


def most_common(contents: Counter) -> dict[str, int]:
    """Returns the counts of the most frequent kinds of contents, and the sum of all others as one kind."""
    found = dict(contents.most_common(MAX_KINDS))
    if rest := contents.total() - sum(found.values()):
        found[OTHERS] = found.get(OTHERS, 0) + rest
    return found


def _checksum(data: np.ndarray, data_starts: np.ndarray) -> str:
    """Returns a checksum of all headers, whose times change in most rewritten shards, and of every 16th content."""
    blocks = data[: len(data) // BLOCK * BLOCK].reshape(-1, BLOCK)
    starts = data_starts // BLOCK
    chosen = np.concatenate([starts - 1, starts[::16]])
    return f"{zlib.crc32(blocks[chosen[chosen < len(blocks)]]):08x}"


class _Headers(NamedTuple):
    """The regular files of a tar: ``names`` uint8 ``[files, 100]``, and int64 ``[files]`` byte offsets."""

    names: np.ndarray
    starts: np.ndarray
    data_starts: np.ndarray
    ends: np.ndarray


def _find_headers(data: np.ndarray) -> _Headers | None:
    """Finds the headers of all files of a tar at once by their magic words.

    Returns None unless these headers follow one another exactly up to the end of the file. That excludes long names,
    sizes over 8 GiB, and images that contain what looks like a header.
    """
    blocks = data[: len(data) // BLOCK * BLOCK].reshape(-1, BLOCK)
    # Compare one byte first, which excludes most blocks.
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
    plain = np.isin(kinds, (*REGULAR_FILES, FOLDER, EXTENDED)).all() and kinds[-1] != EXTENDED
    if not plain or not ends_well.all() or digits.min() < 0 or digits.max() > 7:
        return None
    sizes = digits @ 8 ** np.arange(10, -1, -1)
    following = candidates + 1 + -(-sizes // BLOCK)
    whole = candidates[0] == 0 and following[-1] <= len(blocks) and _only_zeros_between(blocks, candidates, following)
    extended = kinds == EXTENDED
    if not whole or np.any(extended[:-1] & (following[:-1] != candidates[1:])):
        return None
    if extended.any():
        texts = blocks[candidates[extended] + 1]
        if sizes[extended].max() > BLOCK or np.any(extended[:-1] & extended[1:]) or overrides_header(texts.tobytes()):
            return None
    starts = np.where(np.roll(extended, 1), np.roll(candidates, 1), candidates)
    files = np.isin(kinds, REGULAR_FILES)
    if not files.any():
        return None
    return _Headers(
        headers[files, NAME], starts[files] * BLOCK, (candidates[files] + 1) * BLOCK, following[files] * BLOCK
    )


def _only_zeros_between(blocks: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> bool:
    """Whether only blocks of zeros are between members. They end an archive, which another archive may follow."""
    nexts = np.append(starts[1:], len(blocks))
    gaps = np.flatnonzero(ends != nexts)
    if len(gaps) > MAX_GAPS or np.any(ends > nexts):
        return False
    return not any(blocks[ends[gap] : nexts[gap]].any() for gap in gaps.tolist())


def _plain_records(headers: _Headers) -> tuple[np.ndarray, Counter] | None:
    """Returns the same as :func:`_records`, computed for all files at once, and the counts of contents.

    Returns None for unusual names and repeated fields, which need :func:`_records`. Keys and fields are compared by the
    sums of their bytes times random 64-bit numbers.
    """
    length = np.argmin(headers.names, axis=1)[:, None]  # up to the first zero; a name of 100 bytes has none
    if np.take_along_axis(headers.names, length, axis=1).any():
        return None
    position = np.arange(int(length.max()) + 1)
    names = np.where(position < length, headers.names[:, : len(position)], 0)
    slash = np.where(names == ord("/"), position, -1).max(axis=1)
    dots = (names == ord(".")) & (position > slash[:, None])
    dot = np.where(dots.any(axis=1), dots.argmax(axis=1), -1)
    odd = np.any((names[:, :-1] == ord(".")) & (names[:, 1:] == ord(".")))  # perhaps "../"
    odd |= np.isin(names[:, 0], (0, ord("/"), ord("_"))).any() or names.max() > 127  # perhaps "__meta__"
    if odd:
        return None
    named = dot > slash + 1
    if not named.any():
        return None
    contents = Counter(kind_of_unused(name.tobytes().rstrip(b"\0").decode()) for name in names[~named])
    names, dot = names[named], dot[named, None]
    names = np.where(
        (names >= ord("A")) & (names <= ord("Z")) & (position > dot), names + 32, names
    )  # fields in lower case
    factors = np.random.default_rng(0).integers(2**64, size=len(position), dtype=np.uint64)
    keys = np.where(position < dot, names, 0).astype(np.uint64) @ factors
    fields = np.where(position > dot, names, 0).astype(np.uint64) @ factors
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
    """Counts the good records by their fields.

    Args:
      names: uint8 ``[files, length]``.
      dots: int64 ``[files]``, position of the dot before the field.
      fields: uint64 ``[files]``, a sum for each field, which may differ if the dot is at another position.
      first: int64 ``[records]``, index of the first file of each record.
      good: bool ``[records]``.
    """
    sums = np.add.reduceat(fields, first)  # independent of the order of the fields
    _, examples, counts = np.unique(sums[good], return_index=True, return_counts=True)
    ends, rows, found = np.append(first[1:], len(names)), np.flatnonzero(good), Counter()
    for example, count in sorted(zip(examples.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1]):
        if len(found) > MAX_KINDS:
            found[OTHERS] += count
            continue
        files = range(first[rows[example]], ends[rows[example]])
        kinds = sorted(
            names[file, dots[file] + 1 :].astype(np.uint8).tobytes().rstrip(b"\0").decode() for file in files
        )
        found["/".join(kinds)] += count
    return found


def _records(members: Iterable[Member], size: int, contents: Counter) -> Iterator[int]:
    """Yields the numbers of all records: runs of members with one key. A repeated field starts another record.

    ``contents`` is updated as in :class:`ShardIndex`.
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
            contents[kind_of_unused(member.name)] += 1
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
