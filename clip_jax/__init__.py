"""Trains, checks, evaluates and uses CLIP models in JAX and Flax (arXiv 2103.00020)."""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "CLIP": "clip_jax.models.clip",
    "PRESETS": "clip_jax.models.presets",
    "load": "clip_jax.loading",
    "tokenize": "clip_jax.data.tokenizer",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    # On first use, because the pipeline's worker processes import this package and need neither model nor device.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'clip_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
