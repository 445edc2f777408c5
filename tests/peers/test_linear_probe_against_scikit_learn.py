"""The linear probe and scikit-learn's logistic regression: the same objective, so the same accuracy."""

import numpy as np
import pytest

from clip_jax.evaluation.linear_probe import Split, fit, linear_probe

datasets = pytest.importorskip("sklearn.datasets")
linear_model = pytest.importorskip("sklearn.linear_model")

TRAIN_COUNT = 1200


def digits(kind):
    """Train and test split of 8 x 8 digits: their pixels, or unit vectors all about one direction as CLIP's are."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    features = (pixels / 16).astype(np.float32)
    if kind == "embeddings":
        random = np.random.default_rng(0)
        features = np.tanh((features - 0.3) @ random.normal(size=(64, 200)) / 4) + random.normal(size=200)
        features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    return Split(features[:TRAIN_COUNT], labels[:TRAIN_COUNT]), Split(features[TRAIN_COUNT:], labels[TRAIN_COUNT:])


def exact(train, C):  # noqa: N803
    """scikit-learn at a tolerance that does not matter, as its default ends too early on unit vectors."""
    return linear_model.LogisticRegression(C=C, max_iter=5000, tol=1e-7).fit(*train)


@pytest.mark.parametrize("kind", ["pixels", "embeddings"])
@pytest.mark.parametrize("C", [0.01, 0.316, 10, 100])
def test_probe_and_accuracy_are_scikit_learns(mesh_of, kind, C):  # noqa: N803
    train, test = digits(kind)
    ours, theirs = fit(*train, 10, C, mesh_of((4, 2))), exact(train, C)
    np.testing.assert_allclose(ours.weights, theirs.coef_.T, rtol=0, atol=0.02 * np.abs(theirs.coef_).max())
    accuracy = (ours.scores(test.features).argmax(axis=1) == test.labels).mean()
    assert accuracy == pytest.approx(theirs.score(*test), abs=0.002)


@pytest.mark.parametrize("C", [0.01, 0.316, 10])
def test_two_classes_are_those_of_scikit_learns_single_vector(mesh_of, C):  # noqa: N803
    train, test = (Split(split.features, split.labels % 2) for split in digits("pixels"))
    ours, theirs = fit(*train, 2, C, mesh_of((1, 1))), exact(train, C)
    difference = ours.weights[:, 1] - ours.weights[:, 0]
    np.testing.assert_allclose(difference, theirs.coef_[0], rtol=0, atol=0.02 * np.abs(theirs.coef_).max())
    accuracy = (ours.scores(test.features).argmax(axis=1) == test.labels).mean()
    assert accuracy == pytest.approx(theirs.score(*test), abs=0.002)


def test_the_whole_probe_is_scikit_learns_with_the_same_regularisation(mesh_of):
    train, test = digits("pixels")
    result = linear_probe(train, test, 10, mesh_of((1, 1)))
    # The search ends at hardly any regularisation, where the optimum is so flat that float32, and so the kind of
    # processor, decides a few examples.
    few = 3.5 / len(test.labels)
    assert result["accuracy"] == pytest.approx(exact(train, result["C"]).score(*test), abs=few)
