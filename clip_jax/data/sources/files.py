"""Finds and reads files on a disk or in a bucket (``gs://``, ``s3://``), and notices when they change."""

import contextlib
import glob
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import braceexpand

from clip_jax.data.sources.base import PairError, ShardError
from clip_jax.data.sources.buckets import RemoteFile, call_with_retries, is_remote, read_remote

ENDS = 1 << 16  # bytes
BUFFER = 1 << 20  # bytes


class Stamp(NamedTuple):
    """Changes when a file does: its size in bytes, and its modification time or the server's tag."""

    size: int
    time: str


def expand(where: str) -> list[str]:
    """Returns the files that match patterns with ``{00..99}`` and ``*``, joined by commas.

    A local file of exactly this name is not taken for a pattern.

    Raises:
      FileNotFoundError: no file matches one of the patterns.
      ValueError: the braces are not a valid pattern.
    """
    if not is_remote(where) and os.path.exists(where):
        return [where]
    try:
        patterns = [pattern for part in _split_outside_braces(where) for pattern in braceexpand.braceexpand(part)]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    paths = []
    for pattern in patterns:
        if glob.has_magic(pattern) and (is_remote(pattern) or not os.path.exists(pattern)):
            if is_remote(pattern):
                protocol = pattern.partition("://")[0]
                found = sorted(f"{protocol}://{path}" for path in call_with_retries(pattern, "glob", pattern))
            else:
                found = sorted(glob.glob(pattern))
        else:
            found = [pattern]
        if not found:
            raise FileNotFoundError(f"no files match {pattern}")
        paths += found
    return paths


def _split_outside_braces(where: str) -> list[str]:
    parts, depth = [""], 0
    for character in where:
        depth += (character == "{") - (character == "}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def stamp(path: str) -> Stamp:
    """Returns the stamp of a file. Raises FileNotFoundError or another OSError with the file's name."""
    if is_remote(path):
        details = call_with_retries(path, "info", path)
        if details.get("type") == "directory":
            raise IsADirectoryError(f"{path} is a folder, not a file")
        if details.get("size") is None:
            raise OSError(f"{path}: the server does not report the file's size, so that parts of it cannot be read")
        time = next(
            (details[name] for name in ("generation", "ETag", "etag", "LastModified", "mtime") if details.get(name)), ""
        )
        return Stamp(details["size"], str(time))
    try:
        details = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}") from None
    _check_regular(path, details.st_mode)
    return Stamp(details.st_size, str(details.st_mtime_ns))


def _check_regular(path: str, mode: int) -> None:
    """Raises OSError unless it is a regular file: opening a pipe would wait for a writer."""
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is a pipe, socket or device, not a file; write its content to a file first")


def read_range(path: str, start: int, length: int, at_start: Stamp) -> bytes:
    """Returns ``length`` bytes from ``start`` of a shard that had the stamp ``at_start`` when it was opened.

    Raises:
      ShardError: the shard is gone or has changed.
      PairError: a bucket cannot be read now.
    """
    if is_remote(path):
        try:
            data = read_remote(path, start, length, at_start.time)
        except FileNotFoundError:
            raise ShardError(f"{path} has been deleted or rewritten") from None
        except ShardError:
            raise
        except (OSError, ValueError) as error:
            raise PairError(str(error), "unreadable_file") from None
    else:
        # The file is opened for each record, to notice changes and to stay below the limit of open files.
        with _local(path) as file:
            check_unchanged(path, file, at_start)
            data = os.pread(file, length, start)
    if len(data) != length:
        raise ShardError(f"{path} ends {length - len(data):,} bytes too early; copy it again")
    return data


@contextlib.contextmanager
def _local(path: str) -> Iterator[int]:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # to not wait for a writer if it is a pipe
        try:
            yield file
        finally:
            os.close(file)
    except ShardError:
        raise
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}") from None


def check_unchanged(path: str, file: int | str, at_start: Stamp) -> None:
    """Raises ShardError if a local file (a path or a descriptor) no longer has this stamp."""
    now = os.stat(file)
    if (now.st_size, str(now.st_mtime_ns)) != tuple(at_start):
        raise ShardError(f"{path} has changed since the start: it had {at_start.size:,} bytes, now {now.st_size:,}")


def ends_digest(path: str) -> str:
    """Returns a digest of a file's first and last 64 kB, in which most formats store what identifies a file."""
    with open(path, "rb") as file:
        head = file.read(ENDS)
        file.seek(max(0, os.fstat(file.fileno()).st_size - ENDS))
        return hashlib.sha256(head + file.read(ENDS)).hexdigest()[:16]


def open_file(path: str, at_start: Stamp | None = None) -> BinaryIO:
    """Opens a file to read, buffered. Raises OSError, also if it is not a regular file.

    ``at_start`` is its stamp at an earlier time. If a file in a bucket has been rewritten since, reading raises
    ShardError, or on ``gs://`` FileNotFoundError.
    """
    if is_remote(path):
        return io.BufferedReader(RemoteFile(path, *(at_start or stamp(path))), BUFFER)
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # to not wait for a writer if it is a pipe
    try:
        _check_regular(path, os.fstat(file).st_mode)
    except OSError:
        os.close(file)
        raise
    return open(file, "rb", BUFFER)


def read_whole(path: str) -> bytes:
    """Returns a file's content. Raises OSError, also if it is not a regular file."""
    if is_remote(path):
        return call_with_retries(path, "cat_file", path)
    with open_file(path) as file:
        return file.read()


def join(folder: str, name: str) -> str:
    """Returns the path of ``name`` relative to ``folder``. An absolute path is unchanged."""
    if is_remote(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)
