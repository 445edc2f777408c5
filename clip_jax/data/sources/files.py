"""Names, sizes and bytes of files, on a disk or wherever fsspec reaches (``gs://``, ``s3://``)."""

import functools
import glob
import os
from typing import NamedTuple

import braceexpand
import fsspec

from clip_jax.data.sources.base import PairError


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


def read_range(path: str, start: int, length: int, size: int) -> bytes:
    """``length`` bytes from ``start`` of a file that had ``size`` bytes when it was looked at first.

    Raises:
      PairError: the file is gone, cannot be read, or has another size now.
    """
    try:
        if is_remote(path):
            data = _remote(path).cat_file(path, start=start, end=start + length)
        else:
            # Opened for each record: a shard that is deleted or written anew is noticed, and no limit is reached.
            file = os.open(path, os.O_RDONLY)
            try:
                now = os.fstat(file).st_size
                if now != size:
                    raise PairError(f"{path} has {now:,} bytes and had {size:,} when it was opened", "changed_file")
                data = os.pread(file, length, start)
            finally:
                os.close(file)
    except OSError as error:
        raise PairError(f"{path}: {error.strerror or error}", "unreadable_file") from None
    if len(data) != length:
        raise PairError(f"{path} ends {length - len(data):,} bytes too early", "unreadable_file")
    return data


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
