"""Effective robustness: accuracy under a natural distribution shift, above what the ImageNet accuracy predicts.

For models trained on ImageNet, the logits of the two accuracies are on a straight line, which gives the prediction.
Source: section 3.3 and figure 13 of the paper, after Taori et al. (arXiv 2007.00644).
"""

from collections.abc import Sequence

import numpy as np

# Published accuracies have a precision of 0.1 %. Some data sets consist of the mistakes of a standard model, which has
# an accuracy of 0 there: its logit of minus infinity would determine the line.
MIN_SHARE = 1e-3


def logit(share: float | Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns log(p / (1 - p)) of shares of any shape, clipped to ``[MIN_SHARE, 1 - MIN_SHARE]``."""
    clipped = np.clip(np.asarray(share, np.float64), MIN_SHARE, 1 - MIN_SHARE)
    return np.log(clipped / (1 - clipped))


def fit_standard_line(
    imagenet: Sequence[float] | np.ndarray, shift: Sequence[float] | np.ndarray
) -> tuple[float, float]:
    """Fits the least-squares line through standard models, in logits.

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
        raise ValueError(f"a line needs two lists of accuracies of one length, not shapes {x.shape} and {y.shape}")
    if len(np.unique(x)) < 2:
        raise ValueError("a line needs models with two different accuracies on ImageNet")
    x_mean, y_mean = x.mean(), y.mean()
    slope = ((x - x_mean) * (y - y_mean)).sum() / np.square(x - x_mean).sum()
    return float(slope), float(y_mean - slope * x_mean)


def predicted_shift(imagenet: float | Sequence[float] | np.ndarray, line: tuple[float, float]) -> np.ndarray:
    """Returns the accuracy under the shift that the line predicts from the accuracy on ImageNet; both are shares."""
    slope, intercept = line
    return 1 / (1 + np.exp(-(slope * logit(imagenet) + intercept)))


def effective_robustness(imagenet: float, shift: float, line: tuple[float, float]) -> float:
    """Returns the accuracy under the shift minus :func:`predicted_shift`; a share, positive is better."""
    return float(shift - predicted_shift(imagenet, line))
