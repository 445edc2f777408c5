"""One shard of a conversion: a fixed range of a source's records, checked, packed and written as ArrayRecord."""

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
from clip_jax.files import whole, write_whole

SHARD_OPTIONS = "group_size:1,uncompressed"  # random access to single records; pictures are compressed already
BUFFER = re.compile(r" <_io\.BytesIO object at 0x[0-9a-fA-F]+>")


class WriteError(FailedError):
    """The shards cannot be written to the end; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the bytes of the shards depend on, next to the source."""

    pairs_per_shard: int = 10_000
    image_size: int = 0  # px of the short side that larger pictures are scaled down to; 0: their bytes stay as they are
    quality: int = 92  # of the JPEGs that scaled pictures become
    licence: str = ""


@dataclasses.dataclass(frozen=True)
class Job:
    """A source, its way into a folder, and where in it everything is."""

    source: Source
    folder: pathlib.Path
    settings: Settings

    @property
    def shards(self) -> int:
        return -(-len(self.source) // self.settings.pairs_per_shard)

    @property
    def parts(self) -> pathlib.Path:
        return self.folder / "parts"

    def records(self, shard: int) -> range:
        start = shard * self.settings.pairs_per_shard
        return range(start, min(start + self.settings.pairs_per_shard, len(self.source)))

    def shard_path(self, shard: int) -> pathlib.Path:
        return self.folder / f"pairs-{shard:05}.array_record"

    def note_path(self, shard: int) -> pathlib.Path:
        return self.parts / f"{shard:05}.note"

    def note(self, shard: int) -> dict | None:
        """What is known of a shard (see :func:`write_shard`) if it is whole."""
        path = self.note_path(shard)
        if not path.is_file():
            return None
        note = msgpack.unpackb(path.read_bytes())
        shard_path = self.shard_path(shard)
        size = shard_path.stat().st_size if shard_path.is_file() else 0
        return note if size == note["bytes"] else None


def checked(pair: Pair, settings: Settings) -> Pair:
    """The pair as it is written: without blank captions, its picture decoded once and made smaller where asked for.

    Raises:
      PairError: no caption is left.
      ImageError: the picture cannot be decoded; a training would have found out later.
    """
    pair = without_blanks(pair)
    picture = decode_image(pair.image)
    scaled = 0 < settings.image_size < min(picture.size)
    return pair._replace(image=_scaled(picture, settings) if scaled else pair.image)


def without_blanks(pair: Pair) -> Pair:
    """The pair without blank captions. Raises PairError if it has no other."""
    kept = [index for index, caption in enumerate(pair.captions) if caption.strip()]
    if not kept:
        raise PairError(f"{pair.key} has no caption", "empty_caption")
    return pair._replace(
        captions=[pair.captions[index] for index in kept],
        weights=[float(pair.weights[index]) for index in kept] if len(pair.weights) else [],
    )


def pack(pair: Pair) -> bytes:
    """The record of a pair: what :class:`clip_jax.data.sources.ArrayRecordSource` reads.

    Raises:
      PairError: a text cannot be written.
    """
    record = {"key": pair.key, "image": pair.image, "captions": list(pair.captions), "label": pair.label}
    if pair.weights:
        record["weights"] = list(pair.weights)
    try:
        return msgpack.packb(record)
    except UnicodeEncodeError:
        raise PairError(f"{pair.key!a} has a text with half a character", "damaged_record") from None


def _scaled(picture: Image.Image, settings: Settings) -> bytes:
    scale = settings.image_size / min(picture.size)
    size = tuple(max(settings.image_size, round(side * scale)) for side in picture.size)
    stream = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=settings.quality)
    return stream.getvalue()


def write_shard(job: Job, shard: int, plan: Plan, tick: Callable[[], None]) -> None:
    """Writes one shard and then its note, each whole or not at all.

    A shard of which nothing can be used becomes a note alone.

    Args:
      job: what to write.
      shard: its number.
      plan: what to leave out and to merge, known from the notes of all shards.
      tick: called after each record; whatever it raises ends the writing.

    Raises:
      OSError: the shard or its note cannot be written.
      WriteError: a record that is to be merged can no longer be read.
    """
    bad, usable, captions, image_bytes = [], _Usable(), 0, 0
    duplicates, takes = set(plan.duplicates), {records[0]: records[1:] for records in plan.takes}
    known = _Usable.of_note(job.note(shard), set(plan.merged))
    path = job.shard_path(shard)
    with whole(path, folder=job.parts) as unfinished, _Writer(unfinished) as writer:
        for record in job.records(shard):
            if record in known:
                usable.add(record, *known[record])
                tick()
                continue
            key = f"record {record}"
            try:
                pair = _read(job.source, record)
                key = str(pair.key)
                image = pair.image  # as the source has it, which is what makes two pictures the same
                pair = checked(pair, job.settings)
                packed = pack(pair)
                usable.add(record, digest(key.encode()), digest(image))
                if record in duplicates:
                    raise PairError(f"an earlier pair with another picture has the key {key}", "duplicate_key")
                if record in takes:
                    pair = merge([pair, *(_again(job.source, other) for other in takes[record])])
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
    write_whole(job.note_path(shard), msgpack.packb(note, unicode_errors="backslashreplace"))


class _Usable:
    """The records of a shard that can be used, with the digests of their keys and pictures."""

    def __init__(self):
        self.records, self.keys, self.images = [], [], []

    def add(self, record: int, key: bytes, image: bytes) -> None:
        self.records.append(record)
        self.keys.append(key)
        self.images.append(image)

    @staticmethod
    def of_note(note: dict | None, wanted: set[int]) -> dict[int, tuple[bytes, bytes]]:
        """The digests of the wanted records."""
        if note is None or not wanted:
            return {}
        records = np.frombuffer(note["records"], np.int64).tolist()
        spans = [slice(place, place + DIGEST_BYTES) for place in range(0, len(note["keys"]), DIGEST_BYTES)]
        return {
            record: (note["keys"][span], note["images"][span])
            for record, span in zip(records, spans, strict=True)
            if record in wanted
        }


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def _read(source: Source, record: int) -> Pair:
    """Raises PairError for whatever is wrong with the record, OSError if the file that holds it is lost."""
    try:
        return source[record]
    except (PairError, OSError):
        raise
    except Exception as error:  # a source is whatever somebody has put on the web
        raise PairError(f"record {record}: {type(error).__name__}: {one_line(error)}") from None


def _again(source: Source, record: int) -> Pair:
    try:
        return without_blanks(_read(source, record))
    except PairError as error:
        raise WriteError(f"record {record} can no longer be read: {error}; start again") from None


def _message(error: Exception) -> str:
    # Pillow names the buffer that it read from by its address, which differs each time.
    return BUFFER.sub("", str(error))


class _Writer:
    """An ArrayRecordWriter whose errors are OSErrors."""

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
