"""Buckets and servers, as fsspec reaches them: each request has a time limit and is repeated, each error is one line.

How long and how often is set once a process (:func:`use_access`), from ``config.data.bucket_timeout``,
``bucket_retries`` and ``bucket_connections``; worker processes get it with what they are to read.
"""

import functools
import io
import threading
import time
from typing import NamedTuple

import fsspec
import ml_collections
from fsspec.asyn import sync
from fsspec.exceptions import FSTimeoutError

from clip_jax.data.sources.base import ShardError
from clip_jax.errors import one_line

PIECE = 1 << 23  # bytes of one request, so that the time limit is one of silence and not of size
FIRST_PAUSE = 0.25  # seconds before a request is repeated; each further pause is twice as long
MOST_SILENT = 5  # requests in a row, each with its retries
DENIED = (401, 403)  # statuses of HTTP
NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "RefreshError",
}
HOW_TO_LOG_IN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket FSSPEC_S3_ANON=true",
    "gs": "run gcloud auth application-default login; for a public bucket FSSPEC_GS_TOKEN=anon",
}


class Access(NamedTuple):
    """``timeout`` s for an answer of up to 8 MiB, ``retries`` after the first try, ``connections`` of one process."""

    timeout: float = 15.0
    retries: int = 2
    connections: int = 32


def access_of(data: ml_collections.ConfigDict) -> Access:
    """What ``config.data`` says about buckets."""
    return Access(data.bucket_timeout, data.bucket_retries, data.bucket_connections)


class BucketError(OSError):
    """A bucket or server does not give what it is asked for; one line."""


_access = Access()
_silent: dict[str, int] = {}  # requests without an answer since the last that had one, by protocol
_slots = threading.BoundedSemaphore(_access.connections)


def use_access(access: Access) -> None:
    """Sets how this process reads from buckets from now on."""
    global _access, _slots
    if access != _access:
        _access, _slots = access, threading.BoundedSemaphore(access.connections)
        filesystem.cache_clear()


def current_access() -> Access:
    return _access


def is_remote(path: str) -> bool:
    return "://" in path


@functools.cache
def filesystem(protocol: str) -> fsspec.AbstractFileSystem:
    """Raises ValueError if nothing installed reads this protocol, BucketError if it cannot be set up."""
    options = {"use_listings_cache": False}  # what a bucket holds now, not what it held before
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = {
            "connect_timeout": _access.timeout,
            "read_timeout": _access.timeout,
            "max_pool_connections": _access.connections,
            "retries": {"max_attempts": 0},  # ours are the only ones
        }
    try:
        found = fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{protocol}:// cannot be read: {error}; pip install 'clip-jax-tpu[remote]'") from None
    except Exception as error:  # credentials are looked for here by some
        raise _explained(f"{protocol}://", error) from None
    if protocol in ("s3", "s3a"):
        found.retries = 1  # s3fs tries so often by itself
    return found


def ask(path: str, method: str, *arguments, **options):
    """Calls a method of the path's filesystem, with the time limit and the retries of this process.

    Raises:
      FileNotFoundError: there is no such file or bucket.
      BucketError: it may not be read, or nothing answers.
      ShardError: nothing has answered the last five requests either.
      ValueError: as :func:`filesystem`.
    """
    protocol = path.partition("://")[0]
    found = filesystem(protocol)
    for attempt in range(_access.retries + 1):
        try:
            with _slots:
                if found.async_impl:
                    call = getattr(found, f"_{method}")
                    answer = sync(found.loop, call, *arguments, timeout=_access.timeout, **options)
                else:
                    answer = getattr(found, method)(*arguments, **options)
            _silent.pop(protocol, None)
            return answer
        except FileNotFoundError as error:
            cause = error.__cause__  # fsspec says so of a web server that cannot be reached or refuses, too
            if isinstance(cause, OSError) or _status(cause) not in (None, 404):
                raise _explained(path, cause) from None
            raise FileNotFoundError(f"no file {path}; are bucket and path right?") from None
        except Exception as error:  # each kind of bucket raises its own
            if attempt == _access.retries or _is_final(error):
                _count_silence(path, protocol, error)
                raise _explained(path, error) from None
            time.sleep(FIRST_PAUSE * 2**attempt)
    raise AssertionError("unreachable")


def _count_silence(path: str, protocol: str, error: Exception) -> None:
    """Raises ShardError when so many requests in a row have had no answer that nothing more is to be expected."""
    if not isinstance(error, FSTimeoutError | TimeoutError):
        return
    _silent[protocol] = _silent.get(protocol, 0) + 1
    if _silent[protocol] >= MOST_SILENT:
        raise ShardError(f"{_explained(path, error)}; nor had the {MOST_SILENT - 1} requests before") from None


def _is_final(error: Exception) -> bool:
    """Whether asking again would give the same answer."""
    final = isinstance(error, PermissionError | IsADirectoryError | ValueError | TypeError | NotImplementedError)
    return final or type(error).__name__ in NO_CREDENTIALS or _status(error) in (400, *DENIED)


def _status(error: Exception | None) -> int | None:
    """The status of HTTP that an error of gcsfs or aiohttp has."""
    return getattr(error, "code", None) or getattr(error, "status", None)


def _explained(path: str, error: Exception) -> BucketError:
    reason = one_line(error)
    how = HOW_TO_LOG_IN.get(path.partition("://")[0], "see fsspec's documentation of this protocol")
    if type(error).__name__ in NO_CREDENTIALS:
        return BucketError(f"{path}: no credentials ({reason}): {how}")
    if isinstance(error, PermissionError) or _status(error) in DENIED:
        return BucketError(f"{path}: access denied ({reason}); check the credentials and the bucket's permissions")
    if isinstance(error, FSTimeoutError | TimeoutError):
        tries = _access.retries + 1
        return BucketError(
            f"{path}: no answer within {_access.timeout:g} s, {tries} times; check the network and the endpoint, or "
            "raise config.data.bucket_timeout"
        )
    return BucketError(f"{path}: {reason}")


def read_remote(path: str, start: int, length: int) -> bytes:
    """These bytes of a file, in requests of at most 8 MiB; fewer if it ends before. Raises as :func:`ask`."""
    pieces, end = [], start + length
    for place in range(start, end, PIECE):
        pieces.append(ask(path, "cat_file", path, start=place, end=min(end, place + PIECE)))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class RemoteFile(io.RawIOBase):
    """A file of a bucket by ranges; each read is a request of its own, so wrap it where reads are small."""

    def __init__(self, path: str, size: int):
        self._path, self._size, self._place = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._size, self._place + size)
        data = read_remote(self._path, self._place, end - self._place) if end > self._place else b""
        self._place += len(data)
        return data

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
