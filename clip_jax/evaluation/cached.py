"""Caches zero-shot classifiers on disk: embedding the prompts can cost more than embedding the images."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from clip_jax.evaluation.images import all_gather_objects
from clip_jax.files import atomic_path

VERSION = 1  # of the computation; increase it when classifiers change
# From class names and templates to weights float32 [C, D], one unit vector for each class.
Classifier = Callable[[Sequence[str], Sequence[str]], np.ndarray]


def cached_classifier(classifier: Classifier, model: str, folder: pathlib.Path) -> Classifier:
    """Returns ``classifier`` with a cache on disk.

    Args:
      classifier: from class names and templates to weights float32 ``[C, D]``.
      model: identifies all else that the result depends on: the parameters, the architecture, the dtype.
      folder: the cache, created when needed. Errors of reading and writing are ignored: the result is computed again.
    """

    def cached(class_names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        key = json.dumps([VERSION, model, list(class_names), list(templates)])
        file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        # All hosts compute together, so the first host decides for all whether they must.
        weights = all_gather_objects(_load(file, len(class_names)) if jax.process_index() == 0 else None)[0]
        if weights is not None:
            return weights
        weights = classifier(class_names, templates)
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_path(file) as unfinished:
                    np.save(unfinished, weights)
        return weights

    return cached


def _load(file: pathlib.Path, count: int) -> np.ndarray | None:
    """Returns the cached weights of ``count`` classes, or None if the file is missing or damaged."""
    try:
        weights = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return weights if weights.ndim == 2 and len(weights) == count and weights.dtype == np.float32 else None
