"""What tasks of all kinds share: the extras that can be asked for, corruptions, and a check of embeddings."""

import dataclasses
from collections.abc import Callable

import numpy as np

from clip_jax.evaluation.corruptions import CORRUPTIONS, STRENGTHS, corruption
from clip_jax.evaluation.pictures import Pictures


@dataclasses.dataclass(frozen=True)
class Extras:
    """What is measured in addition to a task's own metrics, where the task has the data for it."""

    baseline: bool = False
    synthetic_shift: bool = False
    linear_probe: bool = False


NO_EXTRAS = Extras()


def under_corruptions(pictures: Pictures, measure: Callable[[Pictures], float]) -> dict[str, list[float]]:
    """What is measured on the pictures under each corruption, at strengths 1 to 5."""
    return {
        name: [measure(pictures.changed(corruption(name, strength))) for strength in STRENGTHS] for name in CORRUPTIONS
    }


def finite(embeddings: np.ndarray) -> np.ndarray:
    """The same embeddings; raises FloatingPointError if one is not finite."""
    wrong = np.count_nonzero(~np.isfinite(embeddings).all(axis=1))
    if wrong:
        raise FloatingPointError(
            f"{wrong:,} of {len(embeddings):,} embeddings are not finite; the weights are damaged, or too large for "
            "the dtype"
        )
    return embeddings
