"""Converts any source to ArrayRecord shards, in several processes. It can be killed and continued at any moment.

A shard holds the usable pairs of a fixed range of the source's records, so its bytes depend only on the source and the
settings. An unfinished folder has ``parts/`` with ``job.json``, the description of the conversion, and a note for each
complete shard. Shards and notes are written under temporary names and then renamed, so a kill leaves no incomplete
file under a final name. At the end ``manifest.json`` is written and ``parts/`` is removed.
"""

import dataclasses
import json
import multiprocessing
import pathlib
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from clip_jax.data.merging import Plan, plan_merges
from clip_jax.data.shards import Job, Settings, WriteError, write_shard
from clip_jax.data.sources import Source
from clip_jax.data.sources.buckets import Access, current_access, use_access
from clip_jax.data.workers import end_with_parent
from clip_jax.files import PREFIX, atomic_path, write_atomically

FORMAT_VERSION = 2  # raise this when the same pairs would give other bytes: older conversions are then not continued
EMPTY_PLAN = Plan([], [], [])
PROGRESS_EVERY = 0.5  # seconds between two calls of the progress function

Progress = Callable[[int, int], None]


def write_records(
    source: Source,
    source_name: str,
    folder: pathlib.Path,
    settings: Settings,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
) -> dict:
    """Writes the pairs of a source as ``pairs-*.array_record`` into a folder, or continues an earlier call.

    Pairs with the same key and image, such as table rows with one caption each, become one pair with all captions.
    A pair is left out if its image cannot be decoded, it has no caption, or an earlier pair has its key and another
    image. Such pairs are listed in ``bad_samples.jsonl`` and counted in ``manifest.json``.

    Args:
      source: what to convert. The workers get it by pickle.
      source_name: name for the manifest and for messages.
      folder: new, empty, or one that an earlier call with the same arguments has written to.
      settings: size and encoding of what is written.
      workers: number of processes; 1: this process only.
      progress: called from time to time with the number of records that are done, and of all records.

    Returns:
      The manifest: ``pairs``, ``captions``, ``image_bytes``, ``merged`` records, ``bad_samples`` by reason, ``shards``
      with the name, pairs, size and SHA-256 of each, ``license``, and the ``conversion``: source and settings.

    Raises:
      ValueError: the source is empty, or the folder holds other files.
      OSError: the folder cannot be written to, or the disk is full.
      WriteError: no pair can be used, or a worker was killed.
    """
    if not len(source):
        raise ValueError(f"{source_name} has no pairs")
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
    _run(job, {shard: EMPTY_PLAN for shard in range(job.shards) if job.note(shard) is None}, workers, progress)
    plans = plan_merges(map(job.note, range(job.shards)), settings.pairs_per_shard)
    changed = {shard: plan for shard, plan in plans.items() if job.note(shard)["plan"] != list(plan)}
    _run(job, changed, workers, progress)
    manifest = _summarize(job) | {"license": settings.license, "conversion": conversion}
    if not manifest["pairs"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest["bad_samples"].items())
        raise WriteError(f"none of the {len(source):,} pairs of {source_name} can be used: {reasons}")
    content = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / "manifest.json", content, folder=job.parts)
    shutil.rmtree(job.parts)
    return manifest


def _open_folder(job: Job, conversion: dict) -> dict | None:
    """Prepares the folder. Returns the manifest if the conversion is already finished.

    Raises:
      ValueError: the folder holds other files or another conversion.
    """
    manifest, started = job.folder / "manifest.json", job.parts / "job.json"
    if manifest.is_file():
        found = _read_json(manifest)
        _check_same(job.folder, found.get("conversion", {}), conversion)
        shutil.rmtree(job.parts, ignore_errors=True)  # a kill after the manifest leaves it
        return found
    if started.is_file():
        _check_same(job.folder, _read_json(started), conversion)
        for unfinished in job.parts.glob(f"{PREFIX}*"):
            unfinished.unlink(missing_ok=True)
        return None
    if job.folder.is_dir() and any(path != job.parts for path in job.folder.iterdir()):
        raise ValueError(f"{job.folder} holds other files and no conversion to continue; choose a new folder")
    job.folder.mkdir(parents=True, exist_ok=True)
    job.parts.mkdir(exist_ok=True)
    write_atomically(started, json.dumps(conversion))
    return None


def _read_json(path: pathlib.Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; choose a new folder") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not the manifest of a conversion; choose a new folder")
    return found


def _check_same(folder: pathlib.Path, before: dict, now: dict) -> None:
    """Raises ValueError, with the differences, unless both conversions are the same."""
    before = before | before.get("settings", {})
    now = now | now["settings"]
    different = [
        f"{name} was {before.get(name)!r} and is {now[name]!r}"
        for name in now
        if name != "settings" and before.get(name) != now[name]
    ]
    if different:
        raise ValueError(f"{folder} holds another conversion ({'; '.join(different)}); choose another folder")


def _summarize(job: Job) -> dict:
    """Writes ``bad_samples.jsonl`` and returns the part of the manifest that comes from the shards' notes."""
    totals, reasons, shards = Counter(pairs=0, captions=0, image_bytes=0, merged=0), Counter(), []
    with (
        atomic_path(job.folder / "bad_samples.jsonl", folder=job.parts) as unfinished,
        unfinished.open("w", encoding="utf-8") as lines,
    ):
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
    return dict(totals) | {"bad_samples": dict(sorted(reasons.items())), "shards": shards}


def _run(job: Job, shards: dict[int, Plan], workers: int, progress: Progress) -> None:
    """Writes the given shards by their plans."""
    if not shards:
        return
    total = sum(len(job.records(shard)) for shard in shards)
    progress(0, total)
    if workers == 1:
        done = _Counted(progress, total)
        for shard, plan in shards.items():
            write_shard(job, shard, plan, done.tick)
    else:
        try:
            _run_in_workers(job, shards, min(workers, len(shards)), lambda done: progress(done, total))
        except BrokenProcessPool:
            raise WriteError(
                "a worker process was killed, perhaps for lack of memory; run the command again to continue"
            ) from None
    progress(total, total)


def _run_in_workers(job: Job, shards: dict[int, Plan], workers: int, progress: Callable[[int], None]) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    done, stop = context.Value("Q", 0), context.Event()
    with ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(job, done, stop, current_access())
    ) as pool:
        try:
            # Ctrl-C reaches the workers, too. They inherit this mask and ignore it: this process stops them.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            pending = {pool.submit(_write_in_worker, shard, plan) for shard, plan in shards.items()}
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            while pending:
                finished, pending = wait(pending, timeout=PROGRESS_EVERY, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                if pending:
                    progress(done.value)
        except BaseException:  # also Ctrl-C: the pool would otherwise finish all shards first
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


class _Counted:
    def __init__(self, progress: Progress, total: int):
        self._progress, self._total, self._done, self._last_call = progress, total, 0, 0.0

    def tick(self) -> None:
        self._done += 1
        if self._done < self._total and time.monotonic() > self._last_call + PROGRESS_EVERY:
            self._last_call = time.monotonic()
            self._progress(self._done, self._total)


_worker: dict = {}  # in a worker process: what all of its shards need


def _start_worker(job: Job, done, stop, access: Access) -> None:
    end_with_parent()
    use_access(access)

    def tick() -> None:
        with done.get_lock():
            done.value += 1
        if stop.is_set():
            raise WriteError("stopped")

    _worker.update(job=job, tick=tick)


def _write_in_worker(shard: int, plan: Plan) -> None:
    write_shard(_worker["job"], shard, plan, _worker["tick"])
