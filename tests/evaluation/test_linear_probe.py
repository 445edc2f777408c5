"""Tests the linear probe against an independent solver and on several devices, and the search for C."""

import numpy as np
import pytest
from scipy import optimize, special

from clip_jax.evaluation import linear_probe as module
from clip_jax.evaluation.linear_probe import Split, choose_C, fit, linear_probe


def examples(count, classes, seed=0, width=7):
    """Clusters around a point far from zero, like image embeddings."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % classes)
    centers = np.random.default_rng(9).normal(size=(classes, width)) + 3
    return Split((centers[labels] + random.normal(size=(count, width))).astype(np.float32), labels)


def optimum(split, classes, C):  # noqa: N803
    """Weights and biases by SciPy in float64, the mean of the biases zero."""
    features = split.features.astype(np.float64)
    one_hot = np.eye(classes)[split.labels]
    shape = (features.shape[1] + 1, classes)

    def objective(flat):
        weights, bias = flat.reshape(shape)[:-1], flat.reshape(shape)[-1]
        log_probabilities = special.log_softmax(features @ weights + bias, axis=1)
        residual = C * (np.exp(log_probabilities) - one_hot)
        gradient = np.vstack([features.T @ residual + weights, residual.sum(axis=0)])
        return -C * (log_probabilities * one_hot).sum() + (weights**2).sum() / 2, gradient.ravel()

    options = {"maxiter": 5000, "maxfun": 10_000, "gtol": 1e-9, "ftol": 0}
    found = optimize.minimize(objective, np.zeros(np.prod(shape)), jac=True, method="L-BFGS-B", options=options)
    result = found.x.reshape(shape)
    return result[:-1], result[-1] - result[-1].mean()


@pytest.mark.parametrize("C", [1e-3, 0.316, 10])
def test_the_probe_is_the_optimum_of_another_solver(mesh_of, C):  # noqa: N803
    split = examples(90, 4)
    probe = fit(*split, 4, C, mesh_of((1, 1)))
    weights, bias = optimum(split, 4, C)
    assert probe.weights.dtype == probe.bias.dtype == np.float32
    np.testing.assert_allclose(probe.weights, weights, rtol=0, atol=1e-2 * np.abs(weights).max())
    np.testing.assert_allclose(probe.bias - probe.bias.mean(), bias, rtol=0, atol=1e-2 * np.abs(bias).max())


@pytest.mark.parametrize("count", [90, 96])
def test_one_device_and_eight_find_the_same_with_and_without_padding(mesh_of, count):
    split = examples(count, 4)
    alone, together = (fit(*split, 4, 1.0, mesh_of(shape)) for shape in ((1, 1), (4, 2)))
    np.testing.assert_allclose(alone.weights, together.weights, rtol=0, atol=1e-3)
    np.testing.assert_allclose(alone.bias, together.bias, rtol=0, atol=5e-3)


def test_two_classes_are_penalized_like_one_vector(mesh_of):
    split = examples(60, 2)
    probe = fit(*split, 2, 0.5, mesh_of((1, 1)))
    features, sign = split.features.astype(np.float64), 2 * split.labels - 1

    def objective(flat):
        return -0.5 * special.log_expit(sign * (features @ flat[:-1] + flat[-1])).sum() + (flat[:-1] ** 2).sum() / 2

    expected = optimize.minimize(objective, np.zeros(8), options={"gtol": 1e-6}).x
    np.testing.assert_allclose(probe.weights[:, 1] - probe.weights[:, 0], expected[:-1], rtol=0, atol=2e-3)
    assert probe.bias[1] - probe.bias[0] == pytest.approx(expected[-1], abs=1e-2)


def test_all_values_of_c_share_one_program(mesh_of):
    split, mesh = examples(90, 4), mesh_of((1, 1))
    fit(*split, 4, 1.0, mesh)
    programs = module._minimize._cache_size()
    fit(*split, 4, 2.0, mesh, max_iterations=5)
    assert module._minimize._cache_size() == programs


def test_a_class_without_examples_is_never_predicted_and_changes_nothing(mesh_of):
    split, mesh = examples(90, 4), mesh_of((1, 1))
    four = fit(*split, 4, 1.0, mesh)
    six = fit(split.features, split.labels + (split.labels > 1), 6, 1.0, mesh)  # neither 2 nor 5 occurs
    assert np.isneginf(six.bias[[2, 5]]).all()
    scores = six.scores(split.features)
    np.testing.assert_allclose(scores[:, [0, 1, 3, 4]], four.scores(split.features), rtol=0, atol=2e-2)


def test_the_search_visits_the_papers_grid():
    visited = []
    choose_C(lambda value: visited.append(value) or -abs(np.log10(value) - 0.9))
    steps = (np.log10(visited) + 6) * 8
    np.testing.assert_allclose(steps, steps.round(), atol=1e-9)
    np.testing.assert_allclose(visited[:7], [1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
    # The best are 1, 10, 10, 10 and at last 10 ** 0.875.
    np.testing.assert_allclose(np.log10(visited[7:]), [-1, 1, 0.5, 1.5, 0.75, 1.25, 0.875, 1.125], atol=1e-9)


@pytest.mark.parametrize("peak", [-9, -6, -5.93, -3.1, -1, 0, 0.06, 2.7, 5.99, 6, 7])
@pytest.mark.parametrize("slope_above", [0.1, 1, 10])
def test_the_search_finds_the_peak_within_an_eighth_of_a_decade(peak, slope_above):
    calls = []

    def accuracy(C):  # noqa: N803
        calls.append(C)
        distance = np.log10(C) - peak
        return -distance * slope_above if distance > 0 else distance

    assert abs(np.log10(choose_C(accuracy)) - np.clip(peak, -6, 6)) <= 1 / 8 + 1e-9
    assert len(calls) == len(set(calls)) <= 15


def test_the_smallest_of_equally_good_values_is_chosen():
    assert choose_C(lambda _: 0.5) == pytest.approx(1e-6)


def test_the_probe_uses_the_best_c_of_the_validation_split(mesh_of):
    train, validation, test = (examples(count, 4, seed) for seed, count in enumerate((80, 40, 200)))
    mesh = mesh_of((4, 2))
    result = linear_probe(train, test, 4, mesh, validation)
    both = [np.concatenate(parts) for parts in zip(train, validation, strict=True)]

    def accuracies(features, labels, other):
        def accuracy(C):  # noqa: N803
            scores = fit(features, labels, 4, C, mesh).scores(other.features)
            return float((scores.argmax(axis=1) == other.labels).mean())

        return accuracy

    assert result["C"] == choose_C(accuracies(*train, validation))
    assert result["accuracy"] == pytest.approx(accuracies(*both, test)(result["C"]), abs=0.005)
    assert result["mean_per_class"] == pytest.approx(result["accuracy"])  # each class is a quarter


def test_without_a_validation_split_the_same_fifth_of_each_class_is_used(mesh_of):
    labels = np.repeat([0, 1, 2], [50, 13, 4])
    chosen = module._stratified_fifth(labels)
    assert np.bincount(labels[chosen]).tolist() == [10, 3, 1]
    np.testing.assert_array_equal(chosen, module._stratified_fifth(labels))
    train, test = examples(80, 4), examples(200, 4, seed=1)
    result = linear_probe(train, test, 4, mesh_of((1, 1)))
    assert result == linear_probe(train, test, 4, mesh_of((1, 1)))
    assert result["accuracy"] > 0.6


def test_constant_features_give_the_class_frequencies(mesh_of):
    probe = fit(np.ones((8, 3), np.float32), np.array([0, 0, 0, 1, 1, 1, 1, 2]), 3, 1.0, mesh_of((1, 1)))
    probabilities = special.softmax(probe.scores(np.ones((1, 3), np.float32)))
    np.testing.assert_allclose(probabilities[0], [3 / 8, 4 / 8, 1 / 8], rtol=1e-5)


FEATURES, LABELS = examples(20, 4)


@pytest.mark.parametrize(
    ("features", "labels", "C", "message"),
    [
        (np.where(np.arange(20)[:, None] < 2, np.nan, FEATURES), LABELS, 1, "2 of 20 examples are not finite"),
        (FEATURES, LABELS + 1, 1, r"labels are in \[1, 4\], outside \[0, 3\]"),
        (FEATURES, LABELS - 1, 1, r"labels are in \[-1, 2\]"),
        (FEATURES, LABELS * 0, 1, "a single class"),
        (FEATURES, LABELS[1:], 1, r"\(20, 7\) and labels \(19,\) do not match"),
        (FEATURES[:0], LABELS[:0], 1, "no examples"),
        (FEATURES, LABELS, 0, "C=0 must be above zero"),
        (FEATURES, LABELS, np.nan, "C=nan must be above zero"),
    ],
)
def test_invalid_examples_are_refused(mesh_of, features, labels, C, message):  # noqa: N803
    with pytest.raises(ValueError, match=message):
        fit(features, labels, 4, C, mesh_of((1, 1)))


def test_errors_name_the_split(mesh_of):
    good, mesh = Split(FEATURES, LABELS), mesh_of((1, 1))
    with pytest.raises(ValueError, match="validation: features have width 6, those of train 7"):
        linear_probe(good, good, 4, mesh, Split(FEATURES[:, 1:], LABELS))
    with pytest.raises(ValueError, match="test: features have width 6, those of train 7"):
        linear_probe(good, Split(FEATURES[:, 1:], LABELS), 4, mesh)
    with pytest.raises(ValueError, match=r"test: labels are in \[1, 4\]"):
        linear_probe(good, Split(FEATURES, LABELS + 1), 4, mesh)
    with pytest.raises(ValueError, match="no class has 3 examples"):
        linear_probe(Split(FEATURES[:4], np.arange(4)), good, 4, mesh)
