"""Reads images with captions from ArrayRecord files: those of ``clip_jax.prepare``, and the emoji in this package."""

import json
import os
import pathlib
from collections import Counter
from collections.abc import Sequence

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from grain.sources import ArrayRecordDataSource

from clip_jax.data.sources.base import Pair, PairError
from clip_jax.data.sources.buckets import is_remote
from clip_jax.data.sources.digest import digest
from clip_jax.data.sources.fields import Fields, column_of, name_some, nested, parse_fields, split_options
from clip_jax.data.sources.files import ends_digest, expand
from clip_jax.data.sources.skipping import read_skipped
from clip_jax.errors import first_line

EMOJI_FOLDER = pathlib.Path(__file__).parent.parent / "emoji"
EMOJI_STYLES = ("noto", "twemoji", "openmoji", "fluent_flat", "fluent_color", "emojione", "fxemoji", "noto_v1")
EMOJI_SPLITS = ("train", "held_out")
RECORDS_FOR_NOTES = 100
DEFAULT_FIELDS = Fields(image=("image",), captions=(("captions", 1.0),), label="label")


class ArrayRecordSource:
    """Pairs from ArrayRecord files of msgpack maps, in the order of the files.

    Args:
      paths: files on a disk.
      fields: which entries of a map are read.
      skip: a list of files to skip, see :mod:`clip_jax.data.sources.skipping`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is not an ArrayRecord file, or is in a bucket, or the list is wrong.
    """

    def __init__(self, paths: Sequence[str], fields: Fields = DEFAULT_FIELDS, skip: str = ""):
        for path in paths:
            if is_remote(path):
                raise ValueError(f"{path}: ArrayRecord files must be on a disk; mount the bucket or copy them")
            if not pathlib.Path(path).is_file():
                raise FileNotFoundError(f"no ArrayRecord file {path}")
        self._paths, self._fields = list(paths), fields
        try:
            self._records = ArrayRecordDataSource(self._paths)
        except RuntimeError as error:
            reason = first_line(error) or "damaged or cut short"
            raise ValueError(f"not ArrayRecord files: {', '.join(self._paths)}: {reason}") from None
        self._skipped = read_skipped(skip, self._paths)
        self._ends = np.cumsum([_count_records(path) for path in self._paths]) if skip else None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Pair:
        if self._ends is not None:
            shard = int(np.searchsorted(self._ends, index, side="right"))
            self._skipped.check(shard, self._paths[shard])
        try:
            record = msgpack.unpackb(self._records[index])
            if not isinstance(record, dict):
                raise PairError(f"record {index} is {type(record).__name__}, not a map")
            key = str(record.get("key", ""))
        except PairError:
            raise
        except Exception as error:  # damaged bytes raise errors of many kinds
            raise PairError(f"record {index} is damaged: {type(error).__name__}: {first_line(error)}") from None
        name = key or f"record {index}"
        get = nested(record, name)
        image = next((value for field in self._fields.image if (value := get(field)) is not None), None)
        if image is None:
            raise PairError(f"record {index} has no image in {', '.join(self._fields.image)}", "no_image")
        if not isinstance(image, bytes):
            raise PairError(f"record {index}: the image must be bytes")
        captions, proportions = self._fields.captions_of(get, name)
        stored = record.get("weights")  # the proportions in the source of which these files were written
        if self._fields.captions == DEFAULT_FIELDS.captions and _are_proportions(stored, len(captions)):
            proportions = stored
        return Pair(image, captions, name, self._fields.label_of(get), proportions)

    def notes(self) -> list[str]:
        """Names the unused fields of 100 evenly spaced records: reading all records would take too long."""
        unread, looked_at = Counter(), range(0, len(self), max(1, len(self) // RECORDS_FOR_NOTES))
        for index in looked_at:
            try:
                record = msgpack.unpackb(self._records[index])
                used = {"key", "weights", *(column_of(record, field) for field in self._fields.names())}
                unread.update(str(field) for field in dict(record) if field not in used)
            except Exception:  # the training counts it as a bad sample
                continue
        fields = [f"{field} ({count:,} of {len(looked_at):,} records)" for field, count in unread.items()]
        skipped = [] if self._ends is None else self._skipped.notes(np.diff(self._ends, prepend=0))
        return ([f"not used: fields {name_some(fields)}"] if fields else []) + skipped

    def fingerprint(self) -> str:
        files = [(os.path.basename(path), os.path.getsize(path), ends_digest(path)) for path in self._paths]
        return digest(files, repr(self._fields))


def _count_records(path: str) -> int:
    reader = ArrayRecordReader(path)
    try:
        return reader.num_records()
    finally:
        reader.close()


def _are_proportions(stored: object, captions: int) -> bool:
    if not isinstance(stored, list) or len(stored) != captions:
        return False
    return all(isinstance(number, int | float) and 0 < number < 1e9 for number in stored)


def open_array_record(where: str) -> ArrayRecordSource:
    """Opens ``array_record:where``. Raises as :class:`ArrayRecordSource`, or ValueError for a wrong option."""
    path, options = split_options(where)
    fields, others = parse_fields(options, DEFAULT_FIELDS, f"array_record:{where}", also=("skip",))
    return ArrayRecordSource(expand(path), fields, others.get("skip", ""))


class EmojiGroups(ArrayRecordSource):
    """The emoji in this package with Unicode's group as the class, such as food and drink."""

    def __init__(self, paths: Sequence[str]):
        super().__init__(paths)
        concepts = json.loads((EMOJI_FOLDER / "concepts.json").read_text(encoding="utf-8"))
        self._groups = {concept["key"]: concept["group"] for concept in concepts}

    def __getitem__(self, index: int) -> Pair:
        pair = super().__getitem__(index)
        return pair._replace(label=self._groups[pair.key])


def open_emoji(where: str) -> ArrayRecordSource:
    """Opens ``emoji:where``. Raises ValueError for an unknown style, split or option."""
    path, _, options = where.partition("?")
    styles, _, split = path.partition("/")
    splits = EMOJI_SPLITS if split == "all" else (split,)
    unknown = [style for style in styles.split(",") if style not in EMOJI_STYLES]
    if unknown or not set(splits) <= set(EMOJI_SPLITS):
        raise ValueError(
            f"emoji:{where}: write emoji:STYLES/SPLIT with styles from {', '.join(EMOJI_STYLES)} and a split from "
            f"{', '.join(EMOJI_SPLITS)}, all"
        )
    if options not in ("", "label=group"):
        raise ValueError(f"emoji:{where}: the only option is label=group")
    kind = EmojiGroups if options else ArrayRecordSource
    return kind(
        [str(EMOJI_FOLDER / f"{style}-{split}.array_record") for style in styles.split(",") for split in splits]
    )
