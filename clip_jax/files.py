"""Writes a file or folder completely or not at all: under a temporary name, which is then renamed."""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

PREFIX = ".unfinished-"  # temporary names are hidden so that a pattern such as pairs-* does not match them


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, folder: str | os.PathLike | None = None) -> Iterator[pathlib.Path]:
    """Yields a temporary path. The file or folder that the block creates there is renamed to ``path`` at its end.

    If the block or the renaming raises, the temporary file or folder is removed. A kill leaves it. Several processes
    may write the same path: the last one wins. A file is synced to the disk before it is renamed.

    Args:
      path: the final name. An existing file is replaced; an existing folder only if it is empty.
      folder: folder of the temporary path, on the same file system; that of ``path`` by default. The block may
        create it.

    Yields:
      A path in ``folder`` that does not exist and ends like ``path``.

    Raises:
      OSError: it cannot be renamed.
    """
    path = pathlib.Path(path)
    folder = path.parent if folder is None else pathlib.Path(folder)
    unfinished = folder / f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}"
    try:
        yield unfinished
        if unfinished.is_file():
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        if error.filename is not None and os.fspath(error.filename) == os.fspath(unfinished):
            error.filename = os.fspath(path)  # the user knows this name
        raise
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        elif os.path.lexists(unfinished):
            unfinished.unlink()


def write_atomically(path: str | os.PathLike, content: str | bytes, folder: str | os.PathLike | None = None) -> None:
    """Writes bytes, or text as UTF-8, to a file with :func:`atomic_path`.

    Raises:
      OSError: it cannot be written.
    """
    with atomic_path(path, folder) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
