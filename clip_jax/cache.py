"""Where the program keeps what it can make again."""

import os
import pathlib


def cache_folder(kind: str) -> pathlib.Path:
    """``$XDG_CACHE_HOME/clip_jax/KIND``, by default below ``~/.cache``."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "clip_jax" / kind
