"""Classifiers of class names, remembered on disk: a thousand names in eighty templates are more work than pictures."""

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import jax
import numpy as np

Classifier = Callable[[Sequence[str], Sequence[str]], np.ndarray]


def remembering(classifier: Classifier, what: str, folder: pathlib.Path) -> Classifier:
    """The same function, which looks into ``folder`` first and leaves there what it had to compute.

    Args:
      classifier: class names and templates to weights float32 ``[C, D]``.
      what: whatever else the result depends on: the weights, the dtype.
    """

    def remembered(class_names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        key = json.dumps([what, list(class_names), list(templates)])
        file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        if file.is_file():
            return np.load(file)
        weights = classifier(class_names, templates)
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as stream:
                np.save(stream, weights)
            os.replace(stream.name, file)
        return weights

    return remembered
