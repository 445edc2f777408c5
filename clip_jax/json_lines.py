"""Files with one JSON object per line, to which a run that may be killed at any moment appends."""

import json
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


def read_objects(content: bytes) -> list[dict | None]:
    """Returns the object of each line, or None for a line that is damaged or was cut short by a kill."""

    def read(line: bytes) -> dict | None:
        try:
            found = json.loads(line)
        except ValueError:  # also of bytes that are no UTF-8
            return None
        return found if isinstance(found, dict) else None

    return [read(line) for line in content.splitlines()]
