"""Returns the folder for cached files, such as indexes and embeddings, which the program can compute again."""

import os
import pathlib


def cache_folder(kind: str) -> pathlib.Path:
    """Returns ``$XDG_CACHE_HOME/clip_jax/KIND``, by default below ``~/.cache``. It may not exist yet."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "clip_jax" / kind
