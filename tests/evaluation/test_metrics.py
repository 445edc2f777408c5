"""Tests metrics on cases computed by hand, and properties that hold for any input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.evaluation.metrics import average_precision_11, calibration, mean_per_class_accuracy, roc_auc


def test_mean_per_class_accuracy_weights_occurring_classes_equally():
    labels = np.array([0, 0, 0, 0, 7])
    assert mean_per_class_accuracy(np.array([0, 0, 0, 1, 7]), labels) == pytest.approx((3 / 4 + 1) / 2)
    assert mean_per_class_accuracy(np.array([3, 3, 3, 3, 3]), labels) == 0


def test_average_precision_is_one_for_a_perfect_ranking():
    targets = np.array([[1, 0], [1, 1], [0, 1], [0, 0]], bool)
    assert average_precision_11(targets.astype(float), targets) == 1


def test_average_precision_takes_the_best_precision_at_each_recall_or_more():
    targets = np.array([[1, 0, 1, 0, 0, 1]], bool).T  # precisions 1, 2/3 and 1/2 at recalls 1/3, 2/3 and 1
    scores = -np.arange(6.0)[:, None]
    assert average_precision_11(scores, targets) == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 1 / 2) / 11)
    # A precision that rises again counts for every recall before it.
    targets = np.array([[0, 1, 1, 1]], bool).T
    assert average_precision_11(scores[:4], targets) == pytest.approx(3 / 4)


def test_a_recall_that_is_exactly_a_threshold_reaches_it():
    targets = np.zeros((20, 1), bool)
    targets[:3] = targets[-7:] = True  # three of ten at precision 1, then none before rank 14
    expected = (4 * 1 + 7 * 10 / 20) / 11
    assert average_precision_11(-np.arange(20.0)[:, None], targets) == pytest.approx(expected)


def test_average_precision_ranks_wrong_ones_first_among_equal_scores():
    targets = np.array([[1, 1, 0, 0, 0, 0, 0, 0]], bool).T
    assert average_precision_11(np.zeros((8, 1)), targets) == pytest.approx(2 / 8)
    assert average_precision_11(np.zeros((8, 1)), targets[::-1]) == pytest.approx(2 / 8)


def test_average_precision_is_the_mean_over_classes():
    targets = np.array([[1, 0], [0, 1]], bool)
    scores = np.array([[1.0, 1.0], [0.0, 0.0]])
    assert average_precision_11(scores, targets) == pytest.approx((1 + 1 / 2) / 2)


def test_roc_auc_is_the_share_of_ordered_pairs_and_a_tie_is_half():
    labels = np.array([1, 1, 0, 0])
    assert roc_auc(np.array([0.9, 0.8, 0.2, 0.1]), labels) == 1
    assert roc_auc(np.array([0.9, 0.1, 0.2, 0.05]), labels) == 3 / 4
    assert roc_auc(np.array([0.9, 0.2, 0.2, 0.05]), labels) == 3.5 / 4
    assert roc_auc(np.zeros(4), labels) == 1 / 2


def test_calibration_is_the_distance_between_confidence_and_accuracy():
    probabilities = np.array([0.9, 0.8, 0.95, 0.1])
    correct = np.array([True, False, True, False])
    error, confidence, accuracy, count = calibration(probabilities, correct, bins=2)
    assert count.tolist() == [1, 3]
    np.testing.assert_allclose(confidence, [0.1, 2.65 / 3])
    np.testing.assert_allclose(accuracy, [0, 2 / 3])
    assert error == pytest.approx((0.1 + 3 * (2.65 / 3 - 2 / 3)) / 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_probability_on_an_edge_belongs_to_the_bin_below(dtype):
    edges = (np.arange(11) / 10).astype(dtype)
    count = calibration(edges, np.ones(11, bool), bins=10)[3]
    assert count.tolist() == [2] + [1] * 9


def test_an_empty_bin_has_neither_confidence_nor_accuracy():
    error, confidence, accuracy, count = calibration(np.array([1.0]), np.array([True]))
    assert error == 0
    assert count.tolist() == [0] * 14 + [1]
    assert np.isnan(confidence[:14]).all() and np.isnan(accuracy[:14]).all()


few_scores = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=12)


@settings(max_examples=60, deadline=None)
@given(few_scores)
def test_roc_auc_equals_the_count_over_all_pairs(examples):
    scores, labels = (np.array(column) for column in zip(*examples, strict=True))
    if labels.all() or not labels.any():
        return
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    assert roc_auc(scores, labels.astype(int)) == pytest.approx(np.mean(pairs))


@settings(max_examples=60, deadline=None)
@given(few_scores, st.randoms(use_true_random=False))
def test_no_order_of_ties_has_a_lower_average_precision(examples, random):
    scores, targets = (np.array(column) for column in zip(*examples, strict=True))
    if not targets.any():
        return
    untied = scores + np.array(random.sample(range(len(scores)), len(scores))) / 100
    lowest = average_precision_11(scores[:, None], targets[:, None])
    assert lowest <= average_precision_11(untied[:, None], targets[:, None]) + 1e-12


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30), st.integers(1, 20))
def test_calibration_counts_every_example_once(examples, bins):
    probabilities, correct = (np.array(column) for column in zip(*examples, strict=True))
    error, confidence, accuracy, count = calibration(probabilities, correct, bins)
    assert count.sum() == len(examples)
    assert 0 <= error <= 1
    assert np.nansum(count * accuracy) == pytest.approx(correct.sum())
    assert np.nansum(count * confidence) == pytest.approx(probabilities.sum())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_per_class_accuracy(np.zeros(0, int), np.zeros(0, int)), "nothing to score"),
        (lambda: mean_per_class_accuracy(np.zeros(3, int), np.zeros(2, int)), r"\(3,\) and \(2,\) do not match"),
        (lambda: average_precision_11(np.zeros((0, 2)), np.zeros((0, 2), bool)), "nothing to score"),
        (lambda: average_precision_11(np.full((2, 1), np.nan), np.ones((2, 1), bool)), "2 of 2 scores are not finite"),
        (lambda: average_precision_11(np.zeros((2, 2)), np.array([[1, 0], [1, 0]], bool)), "no image has class 1"),
        (lambda: roc_auc(np.array([np.inf, 0]), np.array([0, 1])), "1 of 2 scores are not finite"),
        (lambda: roc_auc(np.array([0.0, 1]), np.array([0, 2])), "0 or 1"),
        (lambda: roc_auc(np.array([0.0, 1]), np.array([1, 1])), "all labels are the same"),
        (lambda: calibration(np.zeros(0), np.zeros(0, bool)), "nothing to score"),
        (lambda: calibration(np.array([0.5, np.nan]), np.array([True, False])), "not finite"),
        (lambda: calibration(np.array([0.5, 1.5]), np.array([True, False])), r"in \[0, 1\], but are in \[0.5, 1.5\]"),
    ],
)
def test_invalid_inputs_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
