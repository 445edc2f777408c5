"""Writes one shard of a conversion: checks a fixed range of a source's records and writes them as ArrayRecord."""

import dataclasses
import hashlib
import io
import pathlib
import re
from collections.abc import Callable

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from clip_jax.data.images import ImageError, decode_image
from clip_jax.data.merging import DIGEST_BYTES, Plan, merge
from clip_jax.data.sources import Pair, PairError, Source
from clip_jax.errors import FailedError, one_line
from clip_jax.files import atomic_path, write_atomically

SHARD_OPTIONS = "group_size:1,uncompressed"  # random access to single records; images are compressed already
BUFFER = re.compile(r" <_io\.BytesIO object at 0x[0-9a-fA-F]+>")


class WriteError(FailedError):
    """The conversion cannot be finished."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings on which the bytes of the shards depend. The manifest stores them under these names."""

    pairs_per_shard: int = 10_000
    image_size: int = 0  # px; larger images are scaled down to this short side; 0: no image is changed
    quality: int = 92  # of the JPEGs that scaled images become
    license: str = ""


@dataclasses.dataclass(frozen=True)
class Job:
    """A conversion of a source to a folder, with the paths of its files."""

    source: Source
    folder: pathlib.Path
    settings: Settings

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-len(self.source) // self.settings.pairs_per_shard)

    @property
    def parts(self) -> pathlib.Path:
        """The folder of an unfinished conversion's notes."""
        return self.folder / "parts"

    def records(self, shard: int) -> range:
        """Returns the indices of the source's records that belong to a shard."""
        start = shard * self.settings.pairs_per_shard
        return range(start, min(start + self.settings.pairs_per_shard, len(self.source)))

    def shard_path(self, shard: int) -> pathlib.Path:
        return self.folder / f"pairs-{shard:05}.array_record"

    def note_path(self, shard: int) -> pathlib.Path:
        return self.parts / f"{shard:05}.note"

    def note(self, shard: int) -> dict | None:
        """Returns the note of a shard (see :func:`write_shard`), or None if the shard is not complete."""
        path = self.note_path(shard)
        if not path.is_file():
            return None
        note = msgpack.unpackb(path.read_bytes())
        shard_path = self.shard_path(shard)
        size = shard_path.stat().st_size if shard_path.is_file() else 0
        return note if size == note["bytes"] else None


def checked(pair: Pair, settings: Settings) -> Pair:
    """Returns the pair to write: without blank captions, and with its image scaled down if it is too large.

    Raises:
      PairError: it has no caption that is not blank.
      ImageError: the image cannot be decoded.
    """
    pair = without_blanks(pair)
    image = decode_image(pair.image)
    scaled = 0 < settings.image_size < min(image.size)
    return pair._replace(image=_scaled(image, settings) if scaled else pair.image)


def without_blanks(pair: Pair) -> Pair:
    """Returns the pair without blank captions. Raises PairError if it has no others."""
    kept = [index for index, caption in enumerate(pair.captions) if caption.strip()]
    if not kept:
        raise PairError(f"{pair.key} has no caption", "empty_caption")
    return pair._replace(
        captions=[pair.captions[index] for index in kept],
        proportions=[float(pair.proportions[index]) for index in kept] if len(pair.proportions) else [],
    )


def pack(pair: Pair) -> bytes:
    """Returns the record of a pair, which :class:`clip_jax.data.sources.ArrayRecordSource` reads.

    Raises:
      PairError: a text cannot be encoded as UTF-8.
    """
    record = {"key": pair.key, "image": pair.image, "captions": list(pair.captions), "label": pair.label}
    if pair.proportions:
        record["weights"] = list(pair.proportions)
    try:
        return msgpack.packb(record)
    except UnicodeEncodeError:
        raise PairError(f"{pair.key!a} has a text with half a character", "damaged_record") from None


def _scaled(image: Image.Image, settings: Settings) -> bytes:
    scale = settings.image_size / min(image.size)
    size = tuple(max(settings.image_size, round(side * scale)) for side in image.size)
    stream = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=settings.quality)
    return stream.getvalue()


def write_shard(job: Job, shard: int, plan: Plan, tick: Callable[[], None]) -> None:
    """Writes one shard and then its note. Neither exists incomplete. A shard without a usable pair has only a note.

    Args:
      job: the conversion.
      shard: number of the shard.
      plan: what to leave out and to merge, computed from the notes of all shards.
      tick: called after each record. An exception that it raises ends the writing.

    Raises:
      OSError: the shard or its note cannot be written.
      WriteError: a record that is to be merged can no longer be read.
    """
    bad, usable, captions, image_bytes = [], _Usable(), 0, 0
    duplicates, groups = set(plan.duplicates), {records[0]: records[1:] for records in plan.groups}
    known = _Usable.of_note(job.note(shard), set(plan.merged))
    path = job.shard_path(shard)
    with atomic_path(path, folder=job.parts) as unfinished, _Writer(unfinished) as writer:
        for record in job.records(shard):
            if record in known:
                usable.add(record, *known[record])
                tick()
                continue
            key = f"record {record}"
            try:
                pair = _read(job.source, record)
                key = str(pair.key)
                image = pair.image  # unscaled: images are compared as the source has them
                pair = checked(pair, job.settings)
                packed = pack(pair)
                usable.add(record, digest(key.encode()), digest(image))
                if record in duplicates:
                    raise PairError(f"an earlier pair with another image has the key {key}", "duplicate_key")
                if record in groups:
                    pair = merge([pair, *(_again(job.source, other) for other in groups[record])])
                    packed = pack(pair)
                writer.write(packed)
                captions, image_bytes = captions + len(pair.captions), image_bytes + len(pair.image)
            except (PairError, ImageError) as error:
                bad.append({"record": record, "key": key, "reason": error.reason, "message": _message(error)})
            tick()
    pairs = len(usable.records) - len(duplicates) - len(plan.merged)
    if not pairs:
        path.unlink()
    note = {
        "pairs": pairs,
        "captions": captions,
        "image_bytes": image_bytes,
        "merged": len(plan.merged),
        "bytes": path.stat().st_size if pairs else 0,
        "sha256": _sha256(path) if pairs else "",
        "bad": bad,
        "plan": list(plan),
        "records": np.array(usable.records, np.int64).tobytes(),
        "keys": b"".join(usable.keys),
        "images": b"".join(usable.images),
    }
    write_atomically(job.note_path(shard), msgpack.packb(note, unicode_errors="backslashreplace"))


class _Usable:
    """The usable records of a shard, with the digests of their keys and images."""

    def __init__(self):
        self.records, self.keys, self.images = [], [], []

    def add(self, record: int, key: bytes, image: bytes) -> None:
        self.records.append(record)
        self.keys.append(key)
        self.images.append(image)

    @staticmethod
    def of_note(note: dict | None, wanted: set[int]) -> dict[int, tuple[bytes, bytes]]:
        """Returns the digests of the wanted records."""
        if note is None or not wanted:
            return {}
        records = np.frombuffer(note["records"], np.int64).tolist()
        spans = [slice(start, start + DIGEST_BYTES) for start in range(0, len(note["keys"]), DIGEST_BYTES)]
        return {
            record: (note["keys"][span], note["images"][span])
            for record, span in zip(records, spans, strict=True)
            if record in wanted
        }


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def _read(source: Source, record: int) -> Pair:
    """Reads a record. Raises PairError if the record is bad, OSError if its file is lost."""
    try:
        return source[record]
    except (PairError, OSError):
        raise
    except Exception as error:  # data from the web raises errors of any kind
        raise PairError(f"record {record}: {type(error).__name__}: {one_line(error)}") from None


def _again(source: Source, record: int) -> Pair:
    try:
        return without_blanks(_read(source, record))
    except PairError as error:
        raise WriteError(f"record {record} can no longer be read: {error}; run the command again") from None


def _message(error: Exception) -> str:
    # Pillow's messages contain the address of the buffer, which differs each time.
    return BUFFER.sub("", str(error))


class _Writer:
    """An ArrayRecordWriter that raises OSError."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def __enter__(self) -> "_Writer":
        self._writer = self._checked(ArrayRecordWriter, str(self._path), SHARD_OPTIONS)
        return self

    def write(self, record: bytes) -> None:
        self._checked(self._writer.write, record)

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self._checked(self._writer.close)

    def _checked(self, call: Callable, *arguments: object):
        try:
            return call(*arguments)
        except RuntimeError as error:  # "write() failed: No space left on device; writing PATH; at byte ..."
            raise OSError(None, str(error).partition(";")[0], str(self._path.parent.parent)) from None


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
