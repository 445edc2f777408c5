"""Metrics of classification beyond top-k accuracy, and how far probabilities can be trusted."""

import numpy as np

RECALL_THRESHOLDS = 11  # 0, 0.1 ... 1


def mean_per_class_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that occur in ``labels`` of the share of their examples that were predicted.

    Args:
      predictions: int ``[M]``.
      labels: int ``[M]``.

    Raises:
      ValueError: there is nothing to score, or lengths do not match.
    """
    _check(predictions, labels)
    classes, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    right = np.bincount(numbers, weights=predictions == labels, minlength=len(classes))
    return float((right / counts).mean())


def average_precision_11(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean average precision as VOC 2007 defines it, interpolated at 11 recalls.

    Of each class the mean over the recalls 0, 0.1 ... 1 of the best precision at that recall or more. Pictures of equal
    score are ranked the wrong ones first, so a tie never flatters. VOC's "difficult" pictures are no case of their own.

    Args:
      scores: ``[M, C]``, higher is more likely.
      targets: bool ``[M, C]``; a picture may have several classes or none.

    Raises:
      ValueError: there is nothing to score, shapes do not match, a score is not finite, or a class has no picture.
    """
    _check(scores, targets)
    _check_finite(scores)
    without = np.flatnonzero(~targets.any(axis=0))
    if len(without):
        raise ValueError(f"no picture has class {without[0]}, so it has no average precision")

    places = np.arange(1, len(scores) + 1)
    # A recall is a ratio of whole numbers: comparing these keeps 3 of 10 from falling short of 0.1 + 0.1 + 0.1.
    tenths = np.arange(RECALL_THRESHOLDS)
    precisions = []
    for score, target in zip(scores.T, targets.T, strict=True):
        found = target[np.lexsort((target, -score))].cumsum()  # [M]
        precision_from_here = np.maximum.accumulate((found / places)[::-1])[::-1]
        first_place = np.searchsorted(found * (RECALL_THRESHOLDS - 1), tenths * found[-1])
        precisions.append(precision_from_here[first_place].mean())
    return float(np.mean(precisions))


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Chance that a positive example scores higher than a negative one; a tie counts half.

    Args:
      scores: ``[M]``, higher is more likely positive.
      labels: 0 or 1, ``[M]``.

    Raises:
      ValueError: there is nothing to score, lengths do not match, a score is not finite, a label is neither 0 nor 1,
        or all are the same.
    """
    _check(scores, labels)
    _check_finite(scores)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels have to be 0 or 1")
    positive = np.asarray(labels, bool)
    if positive.all() or not positive.any():
        raise ValueError("all labels are the same; the area under the curve needs both")
    negatives = np.sort(scores[~positive])
    below = np.searchsorted(negatives, scores[positive], side="left")
    at_most_equal = np.searchsorted(negatives, scores[positive], side="right")
    return float((below + at_most_equal).mean() / (2 * len(negatives)))


def calibration(
    probabilities: np.ndarray, correct: np.ndarray, bins: int = 15
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Expected calibration error (Guo et al., 2017), and the reliability diagram that it summarises.

    Args:
      probabilities: of the predicted class, ``[M]``.
      correct: whether it was right, bool ``[M]``.
      bins: of equal width over (0, 1]; each holds its upper edge, the first also zero.

    Returns:
      The mean over examples of the distance between their bin's accuracy and mean probability; then of each bin the
      mean probability and the accuracy, float64 ``[bins]``, not a number where it is empty, and the count, int
      ``[bins]``.

    Raises:
      ValueError: there is nothing to score, lengths do not match, or a probability is not in [0, 1].
    """
    _check(probabilities, correct)
    _check_finite(probabilities)
    if probabilities.min() < 0 or probabilities.max() > 1:
        raise ValueError(
            f"probabilities have to be in [0, 1], but reach {probabilities.min()} to {probabilities.max()}"
        )
    # In the inputs' precision, so that a float32 probability that is an edge falls below that edge and not above it.
    edges = np.linspace(0, 1, bins + 1).astype(probabilities.dtype)
    numbers = np.searchsorted(edges[1:], probabilities, side="left")
    count = np.bincount(numbers, minlength=bins)
    nothing = np.full(bins, np.nan)
    confidence, accuracy = (
        np.divide(np.bincount(numbers, weights=values, minlength=bins), count, out=nothing.copy(), where=count > 0)
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
