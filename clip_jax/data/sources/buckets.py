"""Reads buckets and web servers with fsspec. Each request has a time limit and retries, and each error is one line.

:func:`use_access` sets the limits of this process from ``config.data.bucket_timeout``, ``bucket_retries`` and
``bucket_connections``. Worker processes get the same limits.
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

PIECE = 1 << 23  # bytes per request, so that the time limit does not depend on the size of a file
FIRST_PAUSE = 0.25  # seconds before the first retry; each further pause is twice as long
MAX_UNANSWERED = 5  # requests in a row, each with its retries
DENIED = (401, 403)  # HTTP status codes
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
    """``timeout`` in seconds for up to 8 MiB, ``retries`` after the first attempt, ``connections`` per process."""

    timeout: float = 15.0
    retries: int = 2
    connections: int = 32


def access_of(data: ml_collections.ConfigDict) -> Access:
    """Returns the settings of ``config.data`` for buckets."""
    return Access(data.bucket_timeout, data.bucket_retries, data.bucket_connections)


class BucketError(OSError):
    """A bucket or server refuses a request or does not answer it."""


_access = Access()
_unanswered: dict[str, int] = {}  # by protocol: requests without an answer since the last answer
_slots = threading.BoundedSemaphore(_access.connections)


def use_access(access: Access) -> None:
    """Sets how this process reads from buckets."""
    global _access, _slots
    if access != _access:
        _access, _slots = access, threading.BoundedSemaphore(access.connections)
        filesystem.cache_clear()


def current_access() -> Access:
    """Returns how this process reads from buckets."""
    return _access


def is_remote(path: str) -> bool:
    """Whether a path is a URL, such as ``gs://bucket/file``."""
    return "://" in path


@functools.cache
def filesystem(protocol: str) -> fsspec.AbstractFileSystem:
    """Returns fsspec's filesystem of a protocol.

    Raises:
      ValueError: no installed package reads this protocol.
      BucketError: it cannot be set up, for example without credentials.
    """
    options = {"use_listings_cache": False}  # files may be added while the program runs
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = {
            "connect_timeout": _access.timeout,
            "read_timeout": _access.timeout,
            "max_pool_connections": _access.connections,
            "retries": {"max_attempts": 0},  # call_with_retries() retries
        }
    try:
        found = fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{protocol}:// cannot be read: {error}; pip install 'clip-jax-tpu[remote]'") from None
    except Exception as error:  # some filesystems look for credentials here
        raise _explained(f"{protocol}://", error) from None
    if protocol in ("s3", "s3a"):
        found.retries = 1  # s3fs would retry by itself
    return found


def call_with_retries(path: str, method: str, *arguments, **options):
    """Calls a method of the path's filesystem with the time limit and the retries of this process.

    Raises:
      FileNotFoundError: there is no such file or bucket.
      BucketError: access is denied, or there is no answer.
      ShardError: the last five requests had no answer.
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
            _unanswered.pop(protocol, None)
            return answer
        except FileNotFoundError as error:
            cause = error.__cause__  # fsspec also raises this if a web server refuses or cannot be reached
            if isinstance(cause, OSError) or _status(cause) not in (None, 404):
                raise _explained(path, cause) from None
            raise FileNotFoundError(f"no file {path}; are bucket and path right?") from None
        except Exception as error:  # each filesystem raises its own kinds
            if attempt == _access.retries or _is_final(error):
                _count_unanswered(path, protocol, error)
                raise _explained(path, error) from None
            time.sleep(FIRST_PAUSE * 2**attempt)
    raise AssertionError("unreachable")


def _count_unanswered(path: str, protocol: str, error: Exception) -> None:
    """Raises ShardError if too many requests in a row have had no answer."""
    if not isinstance(error, FSTimeoutError | TimeoutError):
        return
    _unanswered[protocol] = _unanswered.get(protocol, 0) + 1
    if _unanswered[protocol] >= MAX_UNANSWERED:
        raise ShardError(f"{_explained(path, error)}; the {MAX_UNANSWERED - 1} requests before failed, too") from None


def _is_final(error: Exception) -> bool:
    """Whether a retry would give the same error."""
    final = isinstance(error, PermissionError | IsADirectoryError | ValueError | TypeError | NotImplementedError)
    return final or type(error).__name__ in NO_CREDENTIALS or _status(error) in (400, *DENIED)


def _status(error: Exception | None) -> int | None:
    """Returns the HTTP status code of an error of gcsfs or aiohttp, if it has one."""
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
    """Reads ``length`` bytes of a file, or fewer at its end, in requests of at most 8 MiB.

    Raises as :func:`call_with_retries`.
    """
    pieces, end = [], start + length
    for offset in range(start, end, PIECE):
        pieces.append(call_with_retries(path, "cat_file", path, start=offset, end=min(end, offset + PIECE)))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class RemoteFile(io.RawIOBase):
    """A file in a bucket. Each read is a request, so wrap it in a buffer."""

    def __init__(self, path: str, size: int):
        self._path, self._size, self._position = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._size, self._position + size)
        data = read_remote(self._path, self._position, end - self._position) if end > self._position else b""
        self._position += len(data)
        return data

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
