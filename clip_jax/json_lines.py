"""Files of JSON objects, a line each, that a kill may cut short at any moment."""

import os
from typing import IO


def open_to_append(path: str | os.PathLike) -> IO[str]:
    """Opens for lines to follow what is there; a last line that was cut short stays a line of its own."""
    with open(path, "a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return open(path, "a", encoding="utf-8")
