"""Trains, evaluates and uses CLIP models in JAX and Flax (arXiv 2103.00020)."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_jax.data.tokenizer import tokenize as tokenize
    from clip_jax.loading import LoadedModel as LoadedModel
    from clip_jax.loading import load as load
    from clip_jax.models.clip import CLIP as CLIP
    from clip_jax.models.presets import PRESETS as PRESETS

__version__ = "0.1.0"

_PUBLIC = {
    "CLIP": "clip_jax.models.clip",
    "LoadedModel": "clip_jax.loading",
    "PRESETS": "clip_jax.models.presets",
    "load": "clip_jax.loading",
    "tokenize": "clip_jax.data.tokenizer",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    # On first use, because the pipeline's worker processes import this package and need neither model nor device.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'clip_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
