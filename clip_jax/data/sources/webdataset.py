"""Reads WebDataset and img2dataset shards in place, with random access into the tar files through an index.

The index takes 8 bytes per record. It is built once, by one thread per core, and memory-mapped by all processes. A
shard whose size or time has changed is indexed again when the source is opened.
"""

import logging
import os
import tarfile
import time
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from clip_jax.data.images import image_suffixes
from clip_jax.data.sources.base import Pair, PairError
from clip_jax.data.sources.buckets import is_remote, read_remote
from clip_jax.data.sources.digest import digest
from clip_jax.data.sources.fields import Fields, column_of, name_some, nested, parse_fields, split_options
from clip_jax.data.sources.files import Stamp, expand, read_range, stamp
from clip_jax.data.sources.mapped_index import MappedIndex, Tables, newest_indices, open_or_build
from clip_jax.data.sources.skipping import read_skipped
from clip_jax.data.sources.tar_index import (
    OTHERS,
    PROBLEM_SHIFT,
    PROBLEMS,
    ShardIndex,
    index_shard,
    unpack,
)
from clip_jax.data.sources.tar_members import read_record

logger = logging.getLogger("clip_jax")

INDEX_VERSION = 2  # of the meaning of a record's number
DEFAULT_FIELDS = Fields(image=("jpg", "jpeg", "png", "webp", "gif", "bmp"), captions=(("txt", 1.0),))
MAX_KINDS = 1_000  # of contents, of all shards
MAX_DAMAGED_NAMED = 5  # shards


class WebDatasetSource:
    """Pairs from tar files, in the order of the files.

    Args:
      paths: the files.
      fields: which members of a record are read.
      index_folder: folder of the index; empty for the default.
      skip: a list of shards to skip, see :mod:`clip_jax.data.sources.skipping`. They may be lost or rewritten if an
        earlier index knows them.

    Raises:
      FileNotFoundError: a shard is missing.
      ValueError: a shard has no records, or the list is wrong.
    """

    def __init__(self, paths: list[str], fields: Fields, index_folder: str = "", skip: str = ""):
        self._fields, self._skipped = fields, read_skipped(skip, paths)
        self._index = _open_index(paths, index_folder, self._skipped.shards)
        self._read_meta()

    def _read_meta(self) -> None:
        self._paths = [path for path, *_ in self._index.meta["shards"]]
        self._stamps = [Stamp(size, time) for _, size, time, *_ in self._index.meta["shards"]]
        self._firsts = self._index.arrays["firsts"]
        self._records = self._index.arrays["records"]

    def __getstate__(self) -> dict:
        return {"_fields": self._fields, "_index": self._index, "_skipped": self._skipped}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._read_meta()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Pair:
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        path = self._paths[shard]
        self._skipped.check(shard, path)
        start, length, problem = unpack(int(self._records[index]))
        where = f"{path}, record {index - int(self._firsts[shard])} at byte {start:,}"
        if problem:
            raise PairError(f"{where}: {self._problem_text(shard, start, problem)}", problem)
        try:
            key, contents = read_record(read_range(path, start, length, self._stamps[shard]))
        except tarfile.TarError as error:
            raise PairError(f"{where}: {error}") from None
        name = f"{path}: {key}"
        image_field = self._image_field(contents)
        if image_field is None:
            raise PairError(f"{name} has no image, only {', '.join(contents)}", "no_image")

        def text(field: str, content: bytes) -> str:
            try:
                return content.decode("utf-8")
            except UnicodeDecodeError:
                raise PairError(f"{name}: {field} is not UTF-8", "damaged_record") from None

        get = nested(contents, name, text)
        captions, proportions = self._fields.captions_of(get, name)
        return Pair(contents[image_field], captions, name, self._fields.label_of(get), proportions)

    def _problem_text(self, shard: int, start: int, problem: str) -> str:
        if problem != "truncated_file":
            return PROBLEM_TEXTS[problem]
        lost = self._stamps[shard].size - start
        found = self._index.meta["problems"].get(self._paths[shard], "the shard ends too early or is damaged")
        return f"the last {lost:,} bytes are lost: {found}"

    def _image_field(self, fields: Collection[str]) -> str | None:
        """Returns the first field of the option ``image`` that a record has; by default any that Pillow reads."""
        named = next((field for field in self._fields.image if field in fields), None)
        if named or self._fields.image != DEFAULT_FIELDS.image:
            return named
        return next((field for field in fields if f".{field}" in image_suffixes()), None)

    def notes(self) -> list[str]:
        unused, other, missing = Counter(), Counter(), Counter()
        for kind, count in _contents_of(self._index).items():
            if kind.startswith("/"):
                other[kind[1:]] += count
                continue
            fields = kind.split("/")
            used = {column_of(fields, field) for field in self._fields.names()[len(self._fields.image) :]}
            image_field = self._image_field(fields)
            missing["no_image"] += count * (image_field is None)
            missing["empty_caption"] += count * (image_field is not None and used <= {None})
            unused.update({field: count for field in fields if field != image_field and field not in used})
        notes = [f"not used: files {name_some(f'.{field} ({count:,})' for field, count in unused.items())}"]
        notes = notes * bool(unused)
        if other:
            notes.append(f"not used: members {name_some(f'{kind} ({count:,})' for kind, count in other.items())}")
        kinds = np.bincount((self._records >> np.uint64(PROBLEM_SHIFT)).astype(np.int64), minlength=len(PROBLEMS))
        bad = {name: int(count) for name, count in zip(PROBLEMS, kinds, strict=True) if name and count} | +missing
        if bad:
            notes.append(f"bad records in all shards: {name_some(f'{name} {count:,}' for name, count in bad.items())}")
        problems = self._index.meta["problems"]
        empty = [path for path, _, _, count, _ in self._index.meta["shards"] if not count and path not in problems]
        if empty:
            notes.append(f"shards without records: {len(empty):,} of {len(self._paths):,}, such as {empty[0]}")
        notes += [f"damaged: {path}: {text}" for path, text in list(problems.items())[:MAX_DAMAGED_NAMED]]
        if len(problems) > MAX_DAMAGED_NAMED:
            notes.append(f"damaged: {len(problems) - MAX_DAMAGED_NAMED:,} more shards")
        return notes + self._skipped.notes(np.diff(self._firsts))

    def fingerprint(self) -> str:
        # Without folders and times, which differ in a copy of the data set.
        shards = [(os.path.basename(path), size, *found) for path, size, _, *found in self._index.meta["shards"]]
        return digest(shards, repr(self._fields))


PROBLEM_TEXTS = {
    "duplicate_key": "an earlier record of the shard has the same key",
    "unsafe_name": "its name is a path outside of the shard's folder",
    "too_large": "it is larger than 4 GiB, or the shard than 128 TiB",
}


def _open_index(paths: list[str], folder: str, skipped: Collection[int]) -> MappedIndex:
    names = [path if is_remote(path) else os.path.abspath(path) for path in paths]
    # Indices of shards in the same folder, or the folder of the first one, share what they know of a shard.
    name = digest(INDEX_VERSION, os.path.dirname(names[0]))
    stamps_before = _stamps_before(name, folder) if skipped else {}

    def stamp_of(number: int) -> Stamp:
        if number in skipped and names[number] in stamps_before:
            return stamps_before[names[number]]
        return stamp(names[number])

    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        stamps = list(pool.map(stamp_of, range(len(names))))
    wanted = [[name, *now] for name, now in zip(names, stamps, strict=True)]

    def build(old: list[MappedIndex]) -> Tables:
        started, threads = time.monotonic(), os.cpu_count() or 1
        known: dict[tuple, ShardIndex] = {}
        for index in reversed(old):
            known |= _records_of(index)
        missing = [index for index, shard in enumerate(wanted) if tuple(shard) not in known]
        found = [known.get(tuple(shard)) for shard in wanted]
        with ThreadPoolExecutor(threads) as pool:
            results = pool.map(lambda index: _index_file(names[index], stamps[index]), missing)
            logged = started
            for done, (index, result) in enumerate(zip(missing, results, strict=True)):
                found[index] = result
                if result.problem:
                    logger.warning("%s, %d records: %s", names[index], len(result.records), result.problem)
                if time.monotonic() - logged > 5:
                    logged = time.monotonic()
                    logger.info("indexing shards: %d of %d", done, len(missing))
        counts = [len(one.records) for one in found]
        shards = [[*shard, len(one.records), one.checksum] for shard, one in zip(wanted, found, strict=True)]
        firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        problems = {name: one.problem for name, one in zip(names, found, strict=True) if one.problem}
        kinds, contents = _pack_contents([one.contents for one in found])
        arrays = {"records": np.concatenate([one.records for one in found]), "firsts": firsts, "contents": contents}
        return Tables({"shards": shards, "problems": problems, "kinds": kinds}, arrays)

    index = open_or_build("tar", name, digest(wanted), folder, build)
    if not index.arrays["firsts"][-1]:
        which = names[0] if len(names) == 1 else f"each of the {len(names):,} shards, such as {names[0]},"
        raise ValueError(f"{which} has no records")
    return index


def _stamps_before(name: str, folder: str) -> dict[str, Stamp]:
    """Returns the stamps of shards by their path, from earlier indices; the newest index counts."""
    found: dict[str, Stamp] = {}
    for index in reversed(newest_indices("tar", name, folder)):
        found |= {path: Stamp(size, time) for path, size, time, *_ in index.meta["shards"]}
    return found


def _pack_contents(contents: list[dict[str, int]]) -> tuple[list[str], np.ndarray]:
    """Returns all kinds of contents, and int64 ``[n, 3]``: rows of a shard, the index of a kind, and its count."""
    total = Counter()
    for one in contents:
        total.update(one)
    kinds = [kind for kind, _ in total.most_common(MAX_KINDS) if kind != OTHERS] + [OTHERS]
    indices = {kind: index for index, kind in enumerate(kinds)}
    rows = [
        (shard, indices.get(kind, len(kinds) - 1), count)
        for shard, one in enumerate(contents)
        for kind, count in one.items()
    ]
    return kinds, np.array(rows, np.int64).reshape(-1, 3)


def _contents_of(index: MappedIndex, shards: slice = slice(None)) -> Counter:
    """Counts the kinds of contents in these rows of the table, by default of all shards."""
    found, kinds = Counter(), index.meta["kinds"]
    rows = index.arrays["contents"][shards]
    counts = np.bincount(rows[:, 1], rows[:, 2], minlength=len(kinds))
    found.update({kind: int(count) for kind, count in zip(kinds, counts, strict=True) if count})
    return found


def _records_of(index: MappedIndex) -> dict[tuple, ShardIndex]:
    firsts, records = index.arrays["firsts"], index.arrays["records"]
    shards = index.meta["shards"]
    ends = np.searchsorted(index.arrays["contents"][:, 0], np.arange(len(shards) + 1))  # the rows are sorted by shard
    return {
        tuple(shard[:3]): ShardIndex(
            records[firsts[number] : firsts[number + 1]],
            shard[4],
            index.meta["problems"].get(shard[0], ""),
            dict(_contents_of(index, slice(ends[number], ends[number + 1]))),
        )
        for number, shard in enumerate(shards)
    }


def _index_file(path: str, at_start: Stamp) -> ShardIndex:
    if not at_start.size:
        return ShardIndex(np.array([], np.uint64), "", "it is empty", {})
    if is_remote(path):
        return index_shard(read_remote(path, 0, *at_start))
    return index_shard(np.memmap(path, np.uint8, mode="r"))


def open_webdataset(where: str) -> WebDatasetSource:
    """Opens ``wds:where``. Raises as :class:`WebDatasetSource`, or ValueError for a wrong option."""
    path, options = split_options(where)
    fields, others = parse_fields(options, DEFAULT_FIELDS, f"wds:{where}", also=("index", "skip"))
    return WebDatasetSource(expand(path), fields, others.get("index", ""), others.get("skip", ""))
