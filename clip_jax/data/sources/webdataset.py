"""Shards of WebDataset and img2dataset, read in place: random access into tars through an index of their records.

The index takes 8 bytes a record. It is built once, by as many threads as there are cores, and mapped by all processes;
a shard whose size or time has changed is looked at again when the source is opened.
"""

import logging
import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from clip_jax.data.sources.base import Pair, PairError
from clip_jax.data.sources.digest import digest
from clip_jax.data.sources.fields import Fields, nested, parse_fields, split_options
from clip_jax.data.sources.files import Stamp, expand, is_remote, read_range, read_whole, stamp
from clip_jax.data.sources.mapped_index import MappedIndex, Tables, open_or_build
from clip_jax.data.sources.tar_index import ShardIndex, index_shard, read_record, unpack

logger = logging.getLogger("clip_jax")

INDEX_VERSION = 1  # of what a record's number means
DEFAULT_FIELDS = Fields(image=("jpg", "jpeg", "png", "webp", "gif", "bmp"), captions=(("txt", 1.0),))


class WebDatasetSource:
    """Pairs from tar files, in the order of the files.

    Raises:
      FileNotFoundError: a shard is missing.
      ValueError: a shard has no records.
    """

    def __init__(self, paths: list[str], fields: Fields, index_folder: str = ""):
        self._fields = fields
        self._index = _open_index(paths, index_folder)
        self._read_meta()

    def _read_meta(self) -> None:
        self._paths = [path for path, *_ in self._index.meta["shards"]]
        self._stamps = [Stamp(size, time) for _, size, time, *_ in self._index.meta["shards"]]
        self._firsts = self._index.arrays["firsts"]
        self._records = self._index.arrays["records"]

    def __getstate__(self) -> dict:
        return {"_fields": self._fields, "_index": self._index}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._read_meta()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Pair:
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        path = self._paths[shard]
        start, length, problem = unpack(int(self._records[index]))
        where = f"{path}, record {index - int(self._firsts[shard])} at byte {start:,}"
        if problem:
            raise PairError(f"{where}: {PROBLEM_TEXTS[problem]}", problem)
        try:
            key, contents = read_record(read_range(path, start, length, self._stamps[shard]))
        except tarfile.TarError as error:
            raise PairError(f"{where}: {error}") from None
        name = f"{path}: {key}"
        image = next((contents[field] for field in self._fields.image if field in contents), None)
        if image is None:
            raise PairError(f"{name} has no picture, only {', '.join(contents)}", "no_picture")

        def text(field: str) -> str | None:
            content = contents.get(field)
            if content is None:
                return None
            try:
                return content.decode("utf-8")
            except UnicodeDecodeError:
                raise PairError(f"{name}: {field} is not UTF-8", "damaged_record") from None

        get = nested(text, name)
        captions, weights = self._fields.captions_of(get, name)
        return Pair(image, captions, name, self._fields.label_of(get), weights)

    def fingerprint(self) -> str:
        # Neither place nor time: a data set that was copied is the same.
        shards = [(os.path.basename(path), size, *found) for path, size, _, *found in self._index.meta["shards"]]
        return digest(shards, repr(self._fields))


PROBLEM_TEXTS = {
    "duplicate_key": "its key is that of an earlier record of the shard",
    "truncated_file": "the shard ends here, too early, or is damaged",
    "unsafe_name": "its name leads out of the shard's folder",
    "too_large": "it is larger than 4 GiB, or the shard than 128 TiB",
}


def _open_index(paths: list[str], folder: str) -> MappedIndex:
    names = [path if is_remote(path) else os.path.abspath(path) for path in paths]
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        stamps = list(pool.map(stamp, names))
    wanted = [[name, *now] for name, now in zip(names, stamps, strict=True)]

    def build(old: MappedIndex | None) -> Tables:
        started, threads = time.monotonic(), os.cpu_count() or 1
        known = _records_of(old) if old else {}
        missing = [index for index, shard in enumerate(wanted) if tuple(shard) not in known]
        found = [known.get(tuple(shard)) for shard in wanted]
        with ThreadPoolExecutor(threads) as pool:
            results = pool.map(lambda index: _index_file(names[index], stamps[index]), missing)
            told = started
            for done, (index, result) in enumerate(zip(missing, results, strict=True)):
                found[index] = result
                if result.problem:
                    logger.warning("%s, %d records: %s", names[index], len(result.records), result.problem)
                if time.monotonic() - told > 5:
                    told = time.monotonic()
                    logger.info("indexing shards: %d of %d", done, len(missing))
        counts = [len(one.records) for one in found]
        shards = [[*shard, len(one.records), one.checksum] for shard, one in zip(wanted, found, strict=True)]
        firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return Tables({"shards": shards}, {"records": np.concatenate([one.records for one in found]), "firsts": firsts})

    index = open_or_build("tar", digest(INDEX_VERSION, names), digest(wanted), folder, build)
    empty = [path for path, _, _, count, _ in index.meta["shards"] if not count]
    if empty:
        raise ValueError(f"{empty[0]} has no records")
    return index


def _records_of(index: MappedIndex) -> dict[tuple, ShardIndex]:
    firsts, records = index.arrays["firsts"], index.arrays["records"]
    return {
        tuple(shard[:3]): ShardIndex(records[first:end], shard[4], "")
        for shard, first, end in zip(index.meta["shards"], firsts[:-1], firsts[1:], strict=True)
    }


def _index_file(path: str, at_start: Stamp) -> ShardIndex:
    if not at_start.size:
        return ShardIndex(np.array([], np.uint64), "", "it is empty")
    return index_shard(read_whole(path) if is_remote(path) else np.memmap(path, np.uint8, mode="r"))


def open_webdataset(where: str) -> WebDatasetSource:
    place, options = split_options(where)
    fields, others = parse_fields(options, DEFAULT_FIELDS, f"wds:{where}", also=("index",))
    return WebDatasetSource(expand(place), fields, others.get("index", ""))
