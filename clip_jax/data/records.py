"""Any source as ArrayRecord shards: written by several processes, every picture decoded once, safe to kill.

A shard holds the usable pairs of a fixed range of the source's records, so its bytes depend on the source and the
settings alone. A folder that is not finished has ``parts/``: ``job.json``, which says what is being written, and a note
for each shard that is whole. Shards and notes are written under temporary names and renamed, so whatever kills the
program leaves nothing that the next start would trust wrongly. ``manifest.json`` comes last, and ``parts/`` goes.
"""

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from clip_jax.data.images import ImageError, decode_image
from clip_jax.data.sources import Pair, PairError, Source
from clip_jax.data.workers import end_with_parent

FORMAT_VERSION = 1  # raise it when the same pairs would come out as other bytes: a conversion then starts anew
SHARD_OPTIONS = "group_size:1,uncompressed"  # random access to single records; pictures are compressed already
KEY_BYTES = 16  # of a key's digest: no two of a billion keys are alike by chance
BUFFER = re.compile(r" <_io\.BytesIO object at 0x[0-9a-fA-F]+>")
NOTICE_EVERY = 0.5  # seconds between two calls of the progress function

Progress = Callable[[int, int], None]


class WriteError(RuntimeError):
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


def write_records(
    source: Source,
    source_name: str,
    folder: pathlib.Path,
    settings: Settings,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
) -> dict:
    """Writes the pairs of a source as ``pairs-*.array_record`` into a folder, or goes on with what is there already.

    Pairs whose picture cannot be decoded, that have no caption, or whose key an earlier pair has, are left out; they
    are listed in ``bad_samples.jsonl`` and counted in ``manifest.json``.

    Args:
      source: what to write; it goes to the workers by pickle.
      source_name: for the manifest and for messages.
      folder: new, empty, or one that the same call was writing into.
      settings: see there.
      workers: processes; 1: this one alone.
      progress: called now and then with how many of how many records are done.

    Returns:
      The manifest: ``pairs``, ``captions``, ``image_bytes``, ``bad_samples`` by reason, ``shards`` with the name,
      pairs, size and SHA-256 of each, ``licence``, and the ``conversion``: the source and the settings.

    Raises:
      ValueError: the source is empty, or the folder holds something else.
      OSError: the folder cannot be written to, or the disk is full.
      WriteError: no pair can be used, or a worker was killed.
    """
    if not len(source):
        raise ValueError(f"{source_name} holds no pairs")
    job = Job(source, folder, settings)
    conversion = {
        "format_version": FORMAT_VERSION,
        "source": source_name,
        "fingerprint": source.fingerprint(),
        "records": len(source),
        "settings": dataclasses.asdict(settings),
    }
    finished = _open_folder(job, conversion)
    if finished:
        return finished
    _run(job, {shard: [] for shard in range(job.shards) if job.note(shard) is None}, workers, progress)
    repeated = _repeated_keys(job)
    anew = {shard: records for shard, records in repeated.items() if job.note(shard)["repeated"] != records}
    _run(job, anew, workers, progress)
    manifest = _summarize(job) | {"licence": settings.licence, "conversion": conversion}
    if not manifest["pairs"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest["bad_samples"].items())
        raise WriteError(f"none of the {len(source):,} pairs of {source_name} can be used: {reasons}")
    _write_whole(job, folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")
    shutil.rmtree(job.parts)
    return manifest


def checked(pair: Pair, settings: Settings) -> Pair:
    """The pair as it is written: without blank captions, its picture decoded once and made smaller where asked for.

    Raises:
      PairError: no caption is left.
      ImageError: the picture cannot be decoded; a training would have found out later.
    """
    kept = [index for index, caption in enumerate(pair.captions) if caption.strip()]
    if not kept:
        raise PairError(f"{pair.key} has no caption", "empty_caption")
    picture = decode_image(pair.image)
    return pair._replace(
        image=_scaled(picture, settings) if 0 < settings.image_size < min(picture.size) else pair.image,
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


def write_shard(job: Job, shard: int, repeated: Sequence[int], tick: Callable[[], None]) -> None:
    """Writes one shard and then its note, each under a temporary name that is changed when it is whole.

    A shard of which nothing can be used becomes a note alone.

    Args:
      job: what to write.
      shard: its number.
      repeated: records of it to leave out since an earlier one has their key.
      tick: called after each record; whatever it raises ends the writing.

    Raises:
      OSError: the shard or its note cannot be written.
    """
    # Another process may still be ending that was writing the same shard, so no two share a temporary name.
    temporary = job.parts / f"{shard:05}.{os.getpid()}.partial"
    bad, records, keys, captions, image_bytes, skipped = [], [], [], 0, 0, set(repeated)
    try:
        with _Writer(temporary) as writer:
            for record in job.records(shard):
                key = f"record {record}"
                try:
                    pair = job.source[record]
                    key = str(pair.key)
                    pair = checked(pair, job.settings)
                    packed = pack(pair)
                    records.append(record)
                    keys.append(hashlib.sha256(key.encode()).digest()[:KEY_BYTES])
                    if record in skipped:
                        raise PairError(f"an earlier pair has the key {key}", "duplicate_key")
                    writer.write(packed)
                    captions += len(pair.captions)
                    image_bytes += len(pair.image)
                except (PairError, ImageError) as error:
                    bad.append({"record": record, "key": key, "reason": error.reason, "message": _message(error)})
                tick()
        pairs = len(records) - len(skipped)
        note = {
            "pairs": pairs,
            "captions": captions,
            "image_bytes": image_bytes,
            "bytes": temporary.stat().st_size if pairs else 0,
            "sha256": _sha256(temporary) if pairs else "",
            "bad": bad,
            "repeated": list(repeated),
            "records": np.array(records, np.int64).tobytes(),
            "keys": b"".join(keys),
        }
        if pairs:
            os.replace(temporary, job.shard_path(shard))
        else:
            job.shard_path(shard).unlink(missing_ok=True)
        _write_whole(job, job.note_path(shard), msgpack.packb(note, unicode_errors="backslashreplace"))
    finally:
        temporary.unlink(missing_ok=True)


def _message(error: Exception) -> str:
    # Pillow names the buffer that it read from by its address, which differs each time.
    return BUFFER.sub("", str(error))


class _Writer:
    """An ArrayRecordWriter whose errors are OSErrors, and whose file is on the disk when the block ends."""

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
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def _checked(self, call: Callable, *arguments: object):
        try:
            return call(*arguments)
        except RuntimeError as error:  # "write() failed: No space left on device; writing PATH; at byte ..."
            raise OSError(None, str(error).partition(";")[0], str(self._path.parent.parent)) from None


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_whole(job: Job, path: pathlib.Path, data: bytes) -> None:
    temporary = job.parts / f"{path.name}.{os.getpid()}.partial"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _open_folder(job: Job, conversion: dict) -> dict | None:
    """Makes the folder ready; returns the manifest if all is there already.

    Raises:
      ValueError: the folder holds something else.
    """
    manifest, started = job.folder / "manifest.json", job.parts / "job.json"
    if manifest.is_file():
        found = _read_json(manifest)
        _check_same(job.folder, found.get("conversion", {}), conversion)
        shutil.rmtree(job.parts, ignore_errors=True)  # killed after the manifest
        return found
    if started.is_file():
        _check_same(job.folder, _read_json(started), conversion)
        for partial in job.parts.glob("*.partial"):
            partial.unlink(missing_ok=True)
        return None
    if job.folder.is_dir() and any(path != job.parts for path in job.folder.iterdir()):
        raise ValueError(f"{job.folder} holds other files and no conversion to go on with; choose a new folder")
    job.folder.mkdir(parents=True, exist_ok=True)
    job.parts.mkdir(exist_ok=True)
    _write_whole(job, started, json.dumps(conversion).encode())
    return None


def _read_json(path: pathlib.Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; choose a new folder") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no manifest of a conversion; choose a new folder")
    return found


def _check_same(folder: pathlib.Path, before: dict, now: dict) -> None:
    """Raises ValueError, naming what differs, unless both conversions are the same."""
    before = before | before.get("settings", {})
    now = now | now["settings"]
    different = [
        f"{name} was {before.get(name)!r} and is {now[name]!r}"
        for name in now
        if name != "settings" and before.get(name) != now[name]
    ]
    if different:
        raise ValueError(f"{folder} holds another conversion ({'; '.join(different)}); choose another folder")


def _repeated_keys(job: Job) -> dict[int, list[int]]:
    """The records of each shard whose key an earlier usable record of the source has; 24 bytes of memory a pair."""
    records, keys = [], []
    for shard in range(job.shards):
        note = job.note(shard)
        records.append(np.frombuffer(note["records"], np.int64))
        keys.append(np.frombuffer(note["keys"], f"S{KEY_BYTES}"))
    records = np.concatenate(records)
    repeated = np.ones(len(records), bool)
    repeated[np.unique(np.concatenate(keys), return_index=True)[1]] = False  # the first of each
    found: dict[int, list[int]] = {}
    for record in records[repeated].tolist():
        found.setdefault(record // job.settings.pairs_per_shard, []).append(record)
    return found


def _summarize(job: Job) -> dict:
    """Writes ``bad_samples.jsonl`` and returns all of the manifest that the shards' notes know."""
    totals, reasons, shards = Counter(pairs=0, captions=0, image_bytes=0), Counter(), []
    temporary = job.parts / "bad_samples.partial"
    with temporary.open("w", encoding="utf-8") as lines:
        for shard in range(job.shards):
            note = job.note(shard)
            totals.update({name: note[name] for name in totals})
            for bad in note["bad"]:
                reasons[bad["reason"]] += 1
                lines.write(json.dumps(bad, ensure_ascii=False) + "\n")
            if note["pairs"]:
                shards.append(
                    {"name": job.shard_path(shard).name} | {key: note[key] for key in ("pairs", "bytes", "sha256")}
                )
    os.replace(temporary, job.folder / "bad_samples.jsonl")
    return dict(totals) | {"bad_samples": dict(sorted(reasons.items())), "shards": shards}


def _run(job: Job, shards: dict[int, list[int]], workers: int, progress: Progress) -> None:
    """Writes these shards, each without the records that are listed for it."""
    if not shards:
        return
    total = sum(len(job.records(shard)) for shard in shards)
    progress(0, total)
    if workers == 1:
        done = _Counted(progress, total)
        for shard, repeated in shards.items():
            write_shard(job, shard, repeated, done.tick)
    else:
        try:
            _run_in_workers(job, shards, min(workers, len(shards)), lambda done: progress(done, total))
        except BrokenProcessPool:
            raise WriteError("a worker process was killed, perhaps for memory; start again to go on") from None
    progress(total, total)


def _run_in_workers(job: Job, shards: dict[int, list[int]], workers: int, progress: Callable[[int], None]) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of this process hold
    done, stop = context.Value("Q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job, done, stop)) as pool:
        try:
            # The workers inherit the mask: on Ctrl-C, which reaches them as well, this process says when to stop.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            pending = {pool.submit(_write_in_worker, shard, repeated) for shard, repeated in shards.items()}
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            while pending:
                finished, pending = wait(pending, timeout=NOTICE_EVERY, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                if pending:
                    progress(done.value)
        except BaseException:  # Ctrl-C as well: the block would wait until all that was submitted is done
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


class _Counted:
    def __init__(self, progress: Progress, total: int):
        self._progress, self._total, self._done, self._told = progress, total, 0, 0.0

    def tick(self) -> None:
        self._done += 1
        if self._done < self._total and time.monotonic() > self._told + NOTICE_EVERY:
            self._told = time.monotonic()
            self._progress(self._done, self._total)


_worker: dict = {}  # of a worker process: what all of its shards need


def _start_worker(job: Job, done, stop) -> None:
    end_with_parent()

    def tick() -> None:
        with done.get_lock():
            done.value += 1
        if stop.is_set():
            raise WriteError("stopped")

    _worker.update(job=job, tick=tick)


def _write_in_worker(shard: int, repeated: list[int]) -> None:
    write_shard(_worker["job"], shard, repeated, _worker["tick"])
