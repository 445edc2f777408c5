"""Code that all kinds of evaluation tasks share: optional measurements, corrupted images, a check of embeddings."""

import dataclasses
from collections.abc import Callable

import numpy as np

from clip_jax.evaluation.corruptions import CORRUPTIONS, STRENGTHS, corruption
from clip_jax.evaluation.images import Images


@dataclasses.dataclass(frozen=True)
class Extras:
    """Optional measurements, made in addition to a task's metrics if the task has the data for them."""

    baseline: bool = False
    synthetic_shift: bool = False
    linear_probe: bool = False


NO_EXTRAS = Extras()


def under_corruptions(images: Images, measure: Callable[[Images], float]) -> dict[str, list[float]]:
    """Returns ``measure(images)`` under each corruption, at strengths 1 to 5."""
    return {name: [measure(images.map(corruption(name, strength))) for strength in STRENGTHS] for name in CORRUPTIONS}


def require_finite(embeddings: np.ndarray) -> np.ndarray:
    """Returns ``embeddings``, ``[M, D]``. Raises FloatingPointError if one is not finite."""
    wrong = np.count_nonzero(~np.isfinite(embeddings).all(axis=1))
    if wrong:
        raise FloatingPointError(
            f"{wrong:,} of {len(embeddings):,} embeddings are not finite; the model's parameters are damaged, or "
            "too large for the dtype"
        )
    return embeddings
