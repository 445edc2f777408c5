"""Tests zero-shot classification on examples computed by hand."""

import numpy as np
import pytest

from clip_jax.evaluation.zero_shot import (
    classifier_weights,
    classify,
    load_prompts,
    nearest_mean_image_scores,
    single_label_metrics,
    top_k_accuracy,
)


def test_classifier_weights_are_the_mean_over_templates_at_unit_length():
    vectors = {"a cat": [1, 0, 0], "no cat": [0, 1, 0], "a dog": [0, 0, 1], "no dog": [0, 0.6, 0.8]}
    asked = []

    def encode_text(texts):
        asked.extend(texts)
        return np.float32([vectors[text] for text in texts])

    weights = classifier_weights(encode_text, ["cat", "dog"], ["a {}", "no {}"])
    assert sorted(asked) == sorted(vectors)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights[0], np.array([1, 1, 0]) / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(weights[1], np.array([0, 0.6, 1.8]) / np.sqrt(0.36 + 3.24), rtol=1e-6)


def test_classifier_weights_have_unit_length_for_any_number_of_classes_and_templates():
    random = np.random.default_rng(0)

    def encode_text(texts):
        x = random.normal(size=(len(texts), 5)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    for classes, templates in ((1, 1), (7, 1), (3, 5)):
        weights = classifier_weights(encode_text, ["x"] * classes, ["{}"] * templates)
        assert weights.shape == (classes, 5)
        np.testing.assert_allclose(np.linalg.norm(weights, axis=1), 1, rtol=1e-6)


def test_top_k_accuracy_counts_the_labels_among_the_k_best():
    scores = np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1], [0.2, 0.3, 0.4]])
    labels = np.array([1, 2, 1])  # first, third, second
    assert top_k_accuracy(scores, labels, 1) == pytest.approx(1 / 3)
    assert top_k_accuracy(scores, labels, 2) == pytest.approx(2 / 3)
    assert top_k_accuracy(scores, labels, 3) == 1


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_same_score_for_every_class_is_never_right(k):
    assert top_k_accuracy(np.zeros((8, 4)), np.arange(8) % 4, k) == 0


def test_the_same_score_for_every_class_is_right_once_k_covers_all_classes():
    assert top_k_accuracy(np.zeros((8, 4)), np.arange(8) % 4, 4) == 1


def test_a_tie_with_one_other_class_costs_one_rank():
    scores = np.array([[0.5, 0.5, 0.1]])
    assert [top_k_accuracy(scores, np.array([0]), k) for k in (1, 2)] == [0, 1]


@pytest.mark.parametrize("k", [1, 2])
def test_scores_that_are_nan_are_never_right(k):
    labels = np.array([0, 1, 2])
    assert top_k_accuracy(np.full((3, 3), np.nan), labels, k) == 0
    scores = np.eye(3)
    scores[np.arange(3), labels] = np.nan  # only the label's own
    assert top_k_accuracy(scores, labels, k) == 0


def test_a_score_that_is_nan_ranks_before_the_label():
    scores = np.array([[0.9, np.nan, 0.1]])
    assert [top_k_accuracy(scores, np.array([0]), k) for k in (1, 2)] == [0, 1]


def test_nearest_mean_image_is_the_distance_to_the_mean_of_each_class():
    def image(*values):
        return np.array(values, np.uint8).reshape(1, 2, 1, 1).repeat(3, axis=3)[0]

    training = np.stack([image(0, 0), image(0, 100), image(200, 200), image(255, 0)])
    labels = np.array([0, 0, 1, 3])  # class 2 has no image; class 0's mean is (0, 50)
    queries = np.stack([image(0, 60), image(180, 190), image(240, 10), image(100, 120)])
    scores = nearest_mean_image_scores(queries, training, labels, num_classes=4)
    assert scores.dtype == np.float32
    assert scores.argmax(axis=1).tolist() == [0, 1, 3, 0]
    assert (scores[:, 2] == -np.inf).all()

    means = np.array([[0, 50], [200, 200], [255, 0]]) / 255
    pixels = np.array([[0, 60], [180, 190], [240, 10], [100, 120]]) / 255
    distances = 3 * np.square(pixels[:, None] - means[None]).sum(axis=2)
    known = scores[:, [0, 1, 3]]
    differences = known - known[:, :1]
    np.testing.assert_allclose(differences, -(distances - distances[:, :1]), rtol=1e-4, atol=1e-5)


def test_the_error_for_unknown_prompts_lists_the_names():
    with pytest.raises(ValueError, match=r"'imagenette'; choose one of .*cifar10, cifar100"):
        load_prompts("imagenette")


NAMES = [f"class {number}" for number in range(12)]


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(params=["distinct", "classes twice"])
def example(request):
    """Embeddings of 300 images and 12 classes, some of them equal, with labels."""
    random = np.random.default_rng(0)
    weights = unit(random.normal(size=(12, 8)))
    if request.param == "classes twice":
        weights[[3, 7]] = weights[5]
    labels = random.integers(0, 12, 300).astype(np.int32)
    images = unit(weights[labels] + 0.5 * random.normal(size=(300, 8)))
    return images, weights, labels


def test_accuracies_of_the_best_classes_equal_those_of_all_scores(example, monkeypatch):
    images, weights, labels = example
    monkeypatch.setattr("clip_jax.evaluation.zero_shot.BLOCK_BYTES", 8 * 12 * 7)  # seven images at a time
    classified = classify(images, weights, 10.0, NAMES, labels)
    scores = images.astype(np.float64) @ weights.T.astype(np.float64)
    metrics = single_label_metrics(classified, labels)
    assert metrics["top_1"] == top_k_accuracy(scores, labels, 1)
    assert metrics["top_5"] == top_k_accuracy(scores, labels, 5)
    assert 0.3 < metrics["top_1"] < metrics["top_5"] < 1
    predicted = np.where(classified.best[:, 0] == labels, labels, -1)
    by_class = [np.mean(predicted[labels == label] == label) for label in range(12)]
    assert metrics["mean_per_class"] == pytest.approx(np.mean(by_class))


def test_equal_classes_tie_and_are_never_right():
    random = np.random.default_rng(1)
    weights = unit(random.normal(size=(40, 33)))
    weights[31] = weights[2]  # of 40 columns by 33 a matrix product rounds the two differently
    labels = np.full(500, 2, np.int32)
    images = unit(weights[labels] + 0.01 * random.normal(size=(500, 33)))
    names = [f"class {number}" for number in range(40)]
    assert single_label_metrics(classify(images, weights, 1.0, names, labels), labels)["top_1"] == 0
    labels[:] = 31
    assert single_label_metrics(classify(images, weights, 1.0, names, labels), labels)["top_1"] == 0


def test_the_first_of_classes_with_the_same_name_is_the_answer_as_with_an_arg_max():
    random = np.random.default_rng(1)
    weights = unit(random.normal(size=(40, 33)))
    weights[31] = weights[2]
    names = [f"class {number}" for number in range(40)]
    names[31] = names[2]  # as ImageNet has two of sunglasses
    images = unit(weights[np.full(500, 2)] + 0.01 * random.normal(size=(500, 33)))
    for label, expected in ((2, 1), (31, 0)):
        labels = np.full(500, label, np.int32)
        found = classify(images, weights, 1.0, names, labels)
        assert single_label_metrics(found, labels)["top_1"] == expected
        assert (found.best[:, :2] == [2, 31]).all()


def test_probabilities_are_the_softmax_of_all_classes(example):
    images, weights, labels = example
    classified = classify(images, weights, 20.0, NAMES, labels)
    logits = 20 * images.astype(np.float64) @ weights.T.astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        classified.probabilities, np.take_along_axis(shares, classified.best.astype(int), axis=1), rtol=1e-4
    )
    assert (np.diff(classified.probabilities, axis=1) <= 0).all()


def test_fewer_than_five_classes_have_no_top_5():
    images, weights, labels = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), np.arange(3, dtype=np.int32)
    metrics = single_label_metrics(classify(images, weights, 100.0, NAMES[:3], labels), labels)
    assert "top_5" not in metrics and metrics["top_1"] == metrics["mean_per_class"] == 1
