"""Classification metrics other than top-k accuracy, and the calibration of probabilities."""

import numpy as np

RECALL_THRESHOLDS = 11  # 0, 0.1 ... 1


def mean_per_class_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean over classes of the share of their examples that were predicted correctly.

    Only classes that occur in ``labels`` count.

    Args:
      predictions: int ``[M]``.
      labels: int ``[M]``.

    Raises:
      ValueError: there is nothing to score, or lengths do not match.
    """
    _check(predictions, labels)
    classes, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    correct = np.bincount(numbers, weights=predictions == labels, minlength=len(classes))
    return float((correct / counts).mean())


def average_precision_11(scores: np.ndarray, targets: np.ndarray) -> float:
    """Returns the mean average precision of VOC 2007, interpolated at 11 recalls.

    The average precision of a class is a mean over the recalls 0, 0.1 ... 1: of the best precision at that recall or
    more. Among images of equal score the wrong ones rank first. VOC's "difficult" images are treated like others.

    Args:
      scores: ``[M, C]``, higher is more likely.
      targets: bool ``[M, C]``; an image may have several classes or none.

    Raises:
      ValueError: there is nothing to score, shapes do not match, a score is not finite, or a class has no image.
    """
    _check(scores, targets)
    _check_finite(scores)
    without = np.flatnonzero(~targets.any(axis=0))
    if len(without):
        raise ValueError(f"no image has class {without[0]}, so it has no average precision")

    positions = np.arange(1, len(scores) + 1)
    # Compares whole numbers: as floats, a recall of 3 / 10 would be below 0.1 + 0.1 + 0.1.
    tenths = np.arange(RECALL_THRESHOLDS)
    precisions = []
    for score, target in zip(scores.T, targets.T, strict=True):
        found = target[np.lexsort((target, -score))].cumsum()  # [M]
        precision_from_here = np.maximum.accumulate((found / positions)[::-1])[::-1]
        first = np.searchsorted(found * (RECALL_THRESHOLDS - 1), tenths * found[-1])
        precisions.append(precision_from_here[first].mean())
    return float(np.mean(precisions))


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the probability that a positive example scores higher than a negative one. A tie counts half.

    Args:
      scores: ``[M]``, higher is more likely positive.
      labels: 0 or 1, ``[M]``.

    Raises:
      ValueError: there is nothing to score, lengths do not match, a score is not finite, a label is neither 0 nor 1,
        or all labels are equal.
    """
    _check(scores, labels)
    _check_finite(scores)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    positive = np.asarray(labels, bool)
    if positive.all() or not positive.any():
        raise ValueError("all labels are the same; the area under the curve needs both classes")
    negatives = np.sort(scores[~positive])
    below = np.searchsorted(negatives, scores[positive], side="left")
    at_most_equal = np.searchsorted(negatives, scores[positive], side="right")
    return float((below + at_most_equal).mean() / (2 * len(negatives)))


def calibration(
    probabilities: np.ndarray, correct: np.ndarray, bins: int = 15
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the expected calibration error (Guo et al., 2017), and its reliability diagram.

    Args:
      probabilities: of the predicted class, ``[M]``.
      correct: whether the prediction is correct, bool ``[M]``.
      bins: number of bins of equal width over (0, 1]. A bin includes its upper edge; the first also includes 0.

    Returns:
      The error: the mean over examples of the distance between the accuracy and the mean probability of their bin.
      Then for each bin the mean probability and the accuracy, float64 ``[bins]``, NaN in an empty bin, and the number
      of examples, int ``[bins]``.

    Raises:
      ValueError: there is nothing to score, lengths do not match, or a probability is not in [0, 1].
    """
    _check(probabilities, correct)
    _check_finite(probabilities)
    if probabilities.min() < 0 or probabilities.max() > 1:
        raise ValueError(f"probabilities must be in [0, 1], but are in [{probabilities.min()}, {probabilities.max()}]")
    # In the precision of the probabilities, so that a float32 probability equal to an edge is in the bin below it.
    edges = np.linspace(0, 1, bins + 1).astype(probabilities.dtype)
    numbers = np.searchsorted(edges[1:], probabilities, side="left")
    count = np.bincount(numbers, minlength=bins)
    empty = np.full(bins, np.nan)
    confidence, accuracy = (
        np.divide(np.bincount(numbers, weights=values, minlength=bins), count, out=empty.copy(), where=count > 0)
        for values in (probabilities, correct)
    )
    error = np.nansum(count * np.abs(accuracy - confidence)) / len(probabilities)
    return float(error), confidence, accuracy, count


def _check(first: np.ndarray, second: np.ndarray) -> None:
    if first.shape != second.shape:
        raise ValueError(f"shapes {first.shape} and {second.shape} do not match")
    if not first.size:
        raise ValueError("there is nothing to score")


def _check_finite(scores: np.ndarray) -> None:
    wrong = np.count_nonzero(~np.isfinite(scores))
    if wrong:
        raise ValueError(f"{wrong} of {scores.size} scores are not finite")
