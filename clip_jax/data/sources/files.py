"""Names, sizes and bytes of files, on a disk or wherever fsspec reaches (``gs://``, ``s3://``)."""

import contextlib
import functools
import glob
import hashlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import braceexpand
import fsspec

from clip_jax.data.sources.base import PairError, ShardError

ENDS = 1 << 16  # bytes


class Stamp(NamedTuple):
    """What changes when a file does: its size in bytes, and its time, or the server's tag, as text."""

    size: int
    time: str


def is_remote(path: str) -> bool:
    return "://" in path


@functools.cache
def _filesystem(protocol: str) -> fsspec.AbstractFileSystem:
    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{protocol}:// cannot be read: {error}; pip install 'clip-jax-tpu[remote]'") from None


def _remote(path: str) -> fsspec.AbstractFileSystem:
    return _filesystem(path.partition("://")[0])


def expand(where: str) -> list[str]:
    """Files that a text names: patterns with ``{00..99}`` and ``*``, several of them with commas between.

    Raises:
      FileNotFoundError: one of the patterns has no file.
      ValueError: braces that are no pattern.
    """
    try:
        patterns = [pattern for part in _split_outside_braces(where) for pattern in braceexpand.braceexpand(part)]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    paths = []
    for pattern in patterns:
        if glob.has_magic(pattern):
            if is_remote(pattern):
                protocol = pattern.partition("://")[0]
                found = sorted(f"{protocol}://{path}" for path in _remote(pattern).glob(pattern))
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
    """Raises FileNotFoundError, or another OSError, with the file's name."""
    try:
        if not is_remote(path):
            details = os.stat(path)
            return Stamp(details.st_size, str(details.st_mtime_ns))
        details = _remote(path).info(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}") from None
    time = next((details[name] for name in ("ETag", "etag", "LastModified", "mtime") if details.get(name)), "")
    return Stamp(details["size"], str(time))


def read_range(path: str, start: int, length: int, at_start: Stamp) -> bytes:
    """``length`` bytes from ``start`` of a shard that had this stamp when it was opened.

    Raises:
      ShardError: the shard is gone, or has been written anew.
      PairError: a bucket does not give these bytes now.
    """
    if is_remote(path):
        try:
            data = _remote(path).cat_file(path, start=start, end=start + length)
        except FileNotFoundError:
            raise ShardError(f"{path} is gone") from None
        except Exception as error:  # each kind of bucket raises its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise PairError(f"{path}: {reason}", "unreadable_file") from None
    else:
        # Opened for each record: a shard that is deleted or written anew is noticed, and no limit is reached.
        with _local(path) as file:
            check_unchanged(path, file, at_start)
            data = os.pread(file, length, start)
    if len(data) != length:
        raise ShardError(f"{path} ends {length - len(data):,} bytes too early")
    return data


@contextlib.contextmanager
def _local(path: str) -> Iterator[int]:
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            yield file
        finally:
            os.close(file)
    except ShardError:
        raise
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}") from None


def check_unchanged(path: str, file: int | str, at_start: Stamp) -> None:
    """Raises ShardError if a local file, or its descriptor, no longer has this stamp."""
    now = os.stat(file)
    if (now.st_size, str(now.st_mtime_ns)) != tuple(at_start):
        raise ShardError(f"{path} has been written anew: it had {at_start.size:,} bytes and has {now.st_size:,}")


def ends_digest(path: str) -> str:
    """A digest of a file's first and last 64 kB, where most formats keep what tells one file from another."""
    with open(path, "rb") as file:
        head = file.read(ENDS)
        file.seek(max(0, os.fstat(file.fileno()).st_size - ENDS))
        return hashlib.sha256(head + file.read(ENDS)).hexdigest()[:16]


def read_whole(path: str) -> bytes:
    """Raises OSError."""
    if is_remote(path):
        return _remote(path).cat_file(path)
    with open(path, "rb") as file:
        return file.read()


def join(folder: str, name: str) -> str:
    """The path of ``name`` as seen from ``folder``; what is absolute already stays as it is."""
    if is_remote(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)
