"""Makes sure that one training at a time writes to a folder, and that all hosts of a pod share it."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator

import jax

from clip_jax.errors import reason
from clip_jax.evaluation.images import all_gather_objects, raise_first
from clip_jax.files import PREFIX

PAUSE = 5  # seconds between signs of life
SILENCE = 20  # seconds without one after which the training of another host is gone
SHARED_WITHIN = 35  # seconds in which another host must see a new file; network disks cache folders for up to 30
NAME = "lock.json"


@contextlib.contextmanager
def claimed(workdir: str | os.PathLike) -> Iterator[None]:
    """A context in which no other training writes to the folder. All hosts enter it; it creates the folder.

    The lock is a file with the host, the process and a counter that grows every five seconds. Whoever finds it with a
    process that is gone, or with a counter that no longer grows, takes it over. If the file is replaced or deleted,
    this process prints one line and ends with exit code 1.

    Raises:
      ValueError: another training is writing to the folder, it cannot be written to, or a host of the pod has another
        folder of this name. All hosts raise it.
    """
    workdir = pathlib.Path(workdir)
    lock = _Lock(workdir) if jax.process_index() == 0 else None
    try:
        problem = _acquired(lock) if lock else ""
        raise_first([found for found in all_gather_objects(problem) if found])
        if jax.process_count() > 1:
            _check_shared(workdir)
        if lock:
            _remove_unfinished(workdir)
            lock.keep()
        yield
    finally:
        if lock:
            lock.release()


def _acquired(lock: "_Lock") -> str:
    try:
        return lock.acquire()
    except OSError as error:  # the other hosts wait for an answer
        return reason(error)


class _Lock:
    """The lock of host 0, for all hosts of a pod."""

    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / NAME
        self._owner = {
            "host": socket.gethostname(),
            "boot": _boot(),
            "process": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "token": uuid.uuid4().hex,
        }
        self._beat = 0
        self._file: int | None = None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._show_life, daemon=True)

    def acquire(self) -> str:
        """Takes the lock. Returns why it cannot, or an empty text."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                break
            except FileExistsError:
                pass
            found = _read(self._path)
            if found is not None and _is_alive(self._path, found, self._owner):
                who = f"process {found.get('process')} on {found.get('host')}, started {found.get('started')}"
                return (
                    f"--workdir={self._path.parent} is in use by another training ({who}); stop that one, or choose "
                    "another --workdir"
                )
            self._remove(found)
        _lock_file(self._file)
        self._write()
        return ""

    def keep(self) -> None:
        """Shows from now on that this process lives."""
        self._thread.start()

    def release(self) -> None:
        """Gives the lock back, if it is still this process's."""
        if self._file is None:
            return
        self._released.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._is_mine():
            self._path.unlink()
        os.close(self._file)

    def _remove(self, found: dict | None) -> None:
        """Removes the lock of a training that is gone, but not the one that a third process has just made."""
        aside = self._path.with_name(f"{PREFIX}{self._owner['token']}-{NAME}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path, aside)
            taken = _read(aside)
            if taken is None or found is None or taken.get("token") == found.get("token"):
                aside.unlink()
            else:
                os.rename(aside, self._path)

    def _write(self) -> None:
        content = json.dumps(self._owner | {"beat": f"{self._beat:012d}"}) + "\n"
        os.pwrite(self._file, content.encode(), 0)  # as long as the one before, so that a full disk takes it

    def _is_mine(self) -> bool:
        found = _read(self._path)
        return found is not None and found.get("token") == self._owner["token"]

    def _show_life(self) -> None:
        while not self._released.wait(PAUSE):
            self._beat += 1
            with contextlib.suppress(OSError):  # a full disk, or one that answers again later
                self._write()
                os.fsync(self._file)
            if not self._path.parent.is_dir():
                self._end(f"the folder {self._path.parent} has been deleted while the training was writing to it")
            if not self._is_mine() and not self._is_mine_after_a_while():
                self._end(f"{self._path} is gone or another training's, so this one must not write there any more")

    def _is_mine_after_a_while(self) -> bool:
        time.sleep(1)
        return self._is_mine()

    def _end(self, line: str) -> None:
        print(f"failed: {line}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(1)


def _boot() -> str:
    """Returns an id of this machine's start, which distinguishes machines of the same name; empty if it has none."""
    file = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else ""


def _read(path: pathlib.Path) -> dict | None:
    """Returns the content of a lock, or None if it is missing or damaged, also after a moment."""
    for _ in range(10):
        try:
            found = json.loads(path.read_bytes())
            if isinstance(found, dict):
                return found
        except FileNotFoundError:
            return None
        except (OSError, ValueError):  # its owner is just writing it
            time.sleep(0.1)
    return None


def _lock_file(file: int) -> bool | None:
    """Locks an open file. Returns False if another process has locked it, None where the disk has no such locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _is_alive(path: pathlib.Path, found: dict, here: dict) -> bool:
    """Returns whether the training that wrote ``found`` into the lock lives; may take ``SILENCE`` seconds."""
    if all(found.get(name) == here[name] for name in ("host", "boot")):
        with contextlib.suppress(FileNotFoundError):
            file = os.open(path, os.O_RDWR)
            try:
                locked = _lock_file(file)
            finally:
                os.close(file)
            if locked is not None:  # the operating system knows which processes of this machine live
                return not locked
    deadline = time.monotonic() + SILENCE
    while time.monotonic() < deadline:
        time.sleep(1)
        if (now := _read(path)) != found:
            return now is not None
    return False


def _remove_unfinished(workdir: pathlib.Path) -> None:
    """Removes the temporary files that killed trainings have left."""
    for folder in (workdir, workdir / "eval", workdir / "report"):
        for path in folder.glob(f"{PREFIX}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_shared(workdir: pathlib.Path) -> None:
    """Raises ValueError on all hosts if one of them does not see the files that host 0 writes."""
    token = all_gather_objects(uuid.uuid4().hex)[0]
    mark, problem = workdir / f"{PREFIX}{token}", ""
    if jax.process_index() == 0:
        mark.touch()
    all_gather_objects("written")
    deadline = time.monotonic() + SHARED_WITHIN
    while not mark.exists() and not problem:
        if time.monotonic() > deadline:
            problem = (
                f"--workdir={workdir} is not the same folder on all hosts: {socket.gethostname()} (host "
                f"{jax.process_index()} of {jax.process_count()}) does not see what host 0 writes; use a disk that all "
                "hosts share"
            )
        time.sleep(0.2)
    problems = all_gather_objects(problem)
    if jax.process_index() == 0:
        mark.unlink()
    raise_first([found for found in problems if found])
