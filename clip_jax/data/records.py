"""Any source as ArrayRecord shards: written by several processes, every picture decoded once, safe to kill.

A shard holds the usable pairs of a fixed range of the source's records, so its bytes depend on the source and the
settings alone. A folder that is not finished has ``parts/``: ``job.json``, which says what is being written, and a note
for each shard that is whole. Shards and notes are written under temporary names and renamed, so whatever kills the
program leaves nothing that the next start would trust wrongly. ``manifest.json`` comes last, and ``parts/`` goes.
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

from clip_jax.data.merging import Plan, plan_shards
from clip_jax.data.shards import Job, Settings, WriteError, write_shard
from clip_jax.data.sources import Source
from clip_jax.data.sources.buckets import Access, current_access, use_access
from clip_jax.data.workers import end_with_parent
from clip_jax.files import PREFIX, whole, write_whole

FORMAT_VERSION = 2  # raise it when the same pairs would come out as other bytes: a conversion then starts anew
NOTHING = Plan([], [], [])
NOTICE_EVERY = 0.5  # seconds between two calls of the progress function

Progress = Callable[[int, int], None]


def write_records(
    source: Source,
    source_name: str,
    folder: pathlib.Path,
    settings: Settings,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
) -> dict:
    """Writes the pairs of a source as ``pairs-*.array_record`` into a folder, or goes on with what is there already.

    Pairs of one key and one picture, as rows of a table with a caption each, become one pair with all captions. Pairs
    whose picture cannot be decoded, that have no caption, or whose key an earlier pair with another picture has, are
    left out; they are listed in ``bad_samples.jsonl`` and counted in ``manifest.json``.

    Args:
      source: what to write; it goes to the workers by pickle.
      source_name: for the manifest and for messages.
      folder: new, empty, or one that the same call was writing into.
      settings: see there.
      workers: processes; 1: this one alone.
      progress: called now and then with how many of how many records are done.

    Returns:
      The manifest: ``pairs``, ``captions``, ``image_bytes``, ``merged`` records, ``bad_samples`` by reason, ``shards``
      with the name, pairs, size and SHA-256 of each, ``licence``, and the ``conversion``: the source and the settings.

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
    _run(job, {shard: NOTHING for shard in range(job.shards) if job.note(shard) is None}, workers, progress)
    plans = plan_shards(map(job.note, range(job.shards)), settings.pairs_per_shard)
    anew = {shard: plan for shard, plan in plans.items() if job.note(shard)["plan"] != list(plan)}
    _run(job, anew, workers, progress)
    manifest = _summarize(job) | {"licence": settings.licence, "conversion": conversion}
    if not manifest["pairs"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest["bad_samples"].items())
        raise WriteError(f"none of the {len(source):,} pairs of {source_name} can be used: {reasons}")
    content = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / "manifest.json", content, folder=job.parts)
    shutil.rmtree(job.parts)
    return manifest


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
        for unfinished in job.parts.glob(f"{PREFIX}*"):
            unfinished.unlink(missing_ok=True)
        return None
    if job.folder.is_dir() and any(path != job.parts for path in job.folder.iterdir()):
        raise ValueError(f"{job.folder} holds other files and no conversion to go on with; choose a new folder")
    job.folder.mkdir(parents=True, exist_ok=True)
    job.parts.mkdir(exist_ok=True)
    write_whole(started, json.dumps(conversion))
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


def _summarize(job: Job) -> dict:
    """Writes ``bad_samples.jsonl`` and returns all of the manifest that the shards' notes know."""
    totals, reasons, shards = Counter(pairs=0, captions=0, image_bytes=0, merged=0), Counter(), []
    with (
        whole(job.folder / "bad_samples.jsonl", folder=job.parts) as unfinished,
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
    """Writes these shards, each by its plan."""
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
            raise WriteError("a worker process was killed, perhaps for memory; start again to go on") from None
    progress(total, total)


def _run_in_workers(job: Job, shards: dict[int, Plan], workers: int, progress: Callable[[int], None]) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of this process hold
    done, stop = context.Value("Q", 0), context.Event()
    with ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(job, done, stop, current_access())
    ) as pool:
        try:
            # The workers inherit the mask: on Ctrl-C, which reaches them as well, this process says when to stop.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            pending = {pool.submit(_write_in_worker, shard, plan) for shard, plan in shards.items()}
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
