"""Writes files and folders whole or not at all: under a temporary name, then renamed."""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

PREFIX = ".unfinished-"  # of temporary names: hidden, so that a pattern such as pairs-* does not match them


@contextlib.contextmanager
def whole(path: str | os.PathLike, folder: str | os.PathLike | None = None) -> Iterator[pathlib.Path]:
    """Gives a temporary path, to make a file or a folder of, that takes the name ``path`` when the block ends.

    If the block or the renaming raises, what was made is removed. A kill leaves it under its temporary name. Several
    processes may write the same path: the last one wins. A file is on the disk before it is renamed.

    Args:
      path: what to write. A file of that name is replaced; a folder is only if it is empty.
      folder: where to write it until then, on the same file system; next to ``path`` if not given. The block
        may make it.

    Yields:
      A path that does not exist, which ends like ``path`` and is in ``folder``.

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
            error.filename = os.fspath(path)  # the name that the user knows
        raise
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        elif os.path.lexists(unfinished):
            unfinished.unlink()


def write_whole(path: str | os.PathLike, content: str | bytes, folder: str | os.PathLike | None = None) -> None:
    """Writes a file of these bytes, or of this text in UTF-8, by :func:`whole`.

    Raises:
      OSError: it cannot be written.
    """
    with whole(path, folder) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
