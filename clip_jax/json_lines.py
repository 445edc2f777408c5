"""Appends lines to files with one JSON object per line. If a kill has cut the last line short, ends that line first."""

import os
from typing import IO


def open_to_append(path: str | os.PathLike) -> IO[str]:
    """Opens a UTF-8 file to append lines. If its last line was cut short, ends that line first.

    Raises:
      OSError: it cannot be opened.
    """
    with open(path, "a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return open(path, "a", encoding="utf-8")
