"""Classifiers of class names, remembered on disk: a thousand names in eighty templates are more work than pictures."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from clip_jax.evaluation.pictures import all_gather_objects
from clip_jax.files import whole

VERSION = 1  # of how a classifier is made
# Class names and templates to weights float32 [C, D], a unit vector a class.
Classifier = Callable[[Sequence[str], Sequence[str]], np.ndarray]


def remembering(classifier: Classifier, what: str, folder: pathlib.Path) -> Classifier:
    """The same function, which looks into ``folder`` first and leaves there what it had to compute.

    Args:
      classifier: class names and templates to weights float32 ``[C, D]``.
      what: whatever else the result depends on: the weights, the architecture, the dtype.
    """

    def remembered(class_names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        key = json.dumps([VERSION, what, list(class_names), list(templates)])
        file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        # Computing takes all hosts, so the first one alone decides for all whether it has to be done.
        known = all_gather_objects(_load(file, len(class_names)) if jax.process_index() == 0 else None)[0]
        if known is not None:
            return known
        weights = classifier(class_names, templates)
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # without a place to keep it, it is computed again
                folder.mkdir(parents=True, exist_ok=True)
                with whole(file) as unfinished:
                    np.save(unfinished, weights)
        return weights

    return remembered


def _load(file: pathlib.Path, count: int) -> np.ndarray | None:
    """What was left there for so many classes; None if there is nothing that can be used."""
    try:
        weights = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return weights if weights.ndim == 2 and len(weights) == count and weights.dtype == np.float32 else None
