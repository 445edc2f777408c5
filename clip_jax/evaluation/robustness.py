"""Effective robustness: what a model keeps under a natural shift beyond what its ImageNet accuracy promises.

The paper's figure 13 and section 3.3, after Taori et al. (arXiv 2007.00644): among models trained on ImageNet the
accuracy under a shift follows from that on ImageNet, along a straight line once both are in logits.
"""

from collections.abc import Sequence

import numpy as np

# Tables give a tenth of a per cent, and some sets were built from what a standard model gets wrong: none right there
# must not become a point at minus infinity that the whole line follows.
LEAST_SHARE = 1e-3


def logit(share: float | Sequence[float] | np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) of shares in [0, 1], of any shape; those next to 0 or 1 count as ``LEAST_SHARE`` from them."""
    clipped = np.clip(np.asarray(share, np.float64), LEAST_SHARE, 1 - LEAST_SHARE)
    return np.log(clipped / (1 - clipped))


def fit_standard_line(
    imagenet: Sequence[float] | np.ndarray, shift: Sequence[float] | np.ndarray
) -> tuple[float, float]:
    """The least-squares line through standard models, in logits.

    Args:
      imagenet: each model's accuracy on ImageNet, a share in [0, 1], ``[N]``.
      shift: the same models' accuracy under the shift, ``[N]``.

    Returns:
      Slope and intercept: logit(shift) = slope * logit(imagenet) + intercept.

    Raises:
      ValueError: the lengths differ, or fewer than two models have different accuracies on ImageNet.
    """
    x, y = logit(imagenet), logit(shift)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"a line needs two equally long lists of accuracies, not shapes {x.shape} and {y.shape}")
    if len(np.unique(x)) < 2:
        raise ValueError("a line needs models with two different accuracies on ImageNet")
    x_mean, y_mean = x.mean(), y.mean()
    slope = ((x - x_mean) * (y - y_mean)).sum() / np.square(x - x_mean).sum()
    return float(slope), float(y_mean - slope * x_mean)


def predicted_shift(imagenet: float | Sequence[float] | np.ndarray, line: tuple[float, float]) -> np.ndarray:
    """The accuracy under the shift, a share, that the line promises to models of this accuracy on ImageNet."""
    slope, intercept = line
    return 1 / (1 + np.exp(-(slope * logit(imagenet) + intercept)))


def effective_robustness(imagenet: float, shift: float, line: tuple[float, float]) -> float:
    """The accuracy under the shift minus what :func:`predicted_shift` says; shares, positive is better."""
    return float(shift - predicted_shift(imagenet, line))
