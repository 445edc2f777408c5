"""Reads buckets and web servers with fsspec. Each request has a time limit and retries, and each error is one line.

:func:`use_access` sets the limits of this process from ``config.data.bucket_timeout``, ``bucket_retries`` and
``bucket_connections``. Worker processes get the same limits.
"""

import functools
import io
import threading
import time
from collections.abc import Awaitable, Callable
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
CHANGED = 412
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


def call_with_retries(path: str, method: str | Callable[..., Awaitable], *arguments, **options):
    """Calls a method of the path's filesystem with the time limit and the retries of this process.

    ``method`` is its name, or for asynchronous filesystems a function of the filesystem and the arguments.

    Raises:
      FileNotFoundError: there is no such file or bucket.
      BucketError: access is denied, or there is no answer.
      ShardError: the last five requests had no answer, or the file is not the one that the options demand.
      ValueError: as :func:`filesystem`.
    """
    protocol = path.partition("://")[0]
    found = filesystem(protocol)
    for attempt in range(_access.retries + 1):
        try:
            with _slots:
                if found.async_impl:
                    call = functools.partial(method, found) if callable(method) else getattr(found, f"_{method}")
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
            if _status(error) == CHANGED:
                raise ShardError(f"{path} has been rewritten since it was opened") from None
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
    """Returns the HTTP status code of an error of gcsfs, aiohttp or s3fs, if it has one."""
    answer = getattr(
        getattr(error, "__cause__", None), "response", None
    )  # botocore's, of which s3fs made another error
    if isinstance(answer, dict):
        return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(error, "status", None) or getattr(error, "code", None)


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


def read_remote(path: str, start: int, length: int, tag: str = "") -> bytes:
    """Reads ``length`` bytes of a file, or fewer at its end, in requests of at most 8 MiB.

    ``tag`` is the file's ETag or generation when it was opened. Each request demands it, where the protocol can, and a
    file that has been rewritten since is a ShardError, or on ``gs://`` a FileNotFoundError.

    Raises as :func:`call_with_retries`.
    """
    read, options = _demanding(path, tag)
    pieces, end = [], start + length
    for offset in range(start, end, PIECE):
        pieces.append(call_with_retries(path, read, path, start=offset, end=min(end, offset + PIECE), **options))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _demanding(path: str, tag: str) -> tuple[str | Callable[..., Awaitable], dict]:
    """Returns how to read a part of a file that must have this tag: a method for call_with_retries, and its options."""
    protocol = path.partition("://")[0]
    if protocol in ("s3", "s3a") and tag:
        return _read_from_s3, {"tag": tag}
    if protocol in ("gs", "gcs") and tag.isdigit():
        return "cat_file", {"generation": tag}
    if protocol in ("http", "https") and tag.startswith('"'):  # a weak tag, W/"...", never matches
        return "cat_file", {"headers": filesystem(protocol).kwargs.get("headers", {}) | {"If-Match": tag}}
    return "cat_file", {}


async def _read_from_s3(found: fsspec.AbstractFileSystem, path: str, start: int, end: int, tag: str) -> bytes:
    bucket, key, _ = found.split_path(path)
    answer = await found._call_s3(  # s3fs's own _cat_file() takes no conditions
        "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", IfMatch=tag
    )
    async with answer["Body"] as body:
        return await body.read()


class RemoteFile(io.RawIOBase):
    """A file in a bucket, with its size in bytes and its tag. Each read is a request, so wrap it in a buffer."""

    def __init__(self, path: str, size: int, tag: str = ""):
        self._path, self._size, self._tag, self._position = path, size, tag, 0

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
        length = end - self._position
        data = read_remote(self._path, self._position, length, self._tag) if length > 0 else b""
        self._position += len(data)
        return data

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
