"""Zero-shot classification (sections 3.1.2 and 3.1.4 of the CLIP paper), and a baseline that compares pixels."""

import json
from collections.abc import Callable, Sequence
from importlib import resources
from typing import NamedTuple

import numpy as np

from clip_jax.evaluation.cached import Classifier
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.metrics import average_precision_11, calibration, mean_per_class_accuracy, roc_auc
from clip_jax.evaluation.results import TOP
from clip_jax.evaluation.similarity import Candidates

BLOCK_BYTES = 2**26  # of scores in memory at a time


class Prompts(NamedTuple):
    """The contents of a file in ``prompts/``. ``class_names`` and ``labels`` have the same order, or are empty."""

    templates: tuple[str, ...]
    class_names: tuple[str, ...]
    labels: tuple[str, ...]


def load_prompts(name: str) -> Prompts:
    """Returns the prompts of ``clip_jax/evaluation/prompts/<name>.json``. Templates have ``{}`` for the class name.

    Raises:
      ValueError: the file does not exist; the message lists the names.
    """
    folder = resources.files("clip_jax.evaluation") / "prompts"
    files = {entry.name.removesuffix(".json"): entry for entry in folder.iterdir()}
    if name not in files:
        raise ValueError(f"there are no prompts {name!r}; choose one of {', '.join(sorted(files))}")
    content = json.loads(files[name].read_text(encoding="utf-8"))
    return Prompts(*(tuple(content.get(key, ())) for key in Prompts._fields))


def classifier_weights(
    encode_text: Callable[[Sequence[str]], np.ndarray], names: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """Returns the weights of a zero-shot classifier, float32 ``[C, D]``, one unit vector for each class.

    A vector is the mean of the class's text embeddings over all templates, normalized (section 3.1.4).

    Args:
      encode_text: from texts to embeddings float32 ``[N, D]`` of unit length.
      names: of the C classes.
      templates: sentences with ``{}`` for the name.
    """
    prompts = [template.replace("{}", name) for name in names for template in templates]
    embeddings = encode_text(prompts).reshape(len(names), len(templates), -1)  # [C, T, D]
    mean = embeddings.mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def classifier_of(embedder: Embedder) -> Classifier:
    """Returns :func:`classifier_weights` for a model. The result raises FloatingPointError if one is not finite."""

    def classifier(class_names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        weights = classifier_weights(embedder.encode_text, class_names, templates)
        if not np.isfinite(weights).all():
            raise FloatingPointError(
                "the embeddings of the class names are not finite; the model's parameters are damaged"
            )
        return weights

    return classifier


def label_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the rank of each row's label, int ``[M]``; 0 is the best.

    A class with the same score as the label, or with the score NaN, ranks before it. So a model that gives every class
    the same score is never right.

    Args:
      scores: ``[M, C]``, higher is better.
      labels: int ``[M]``.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)  # [M, 1]
    # Not ">=", which is False for NaN.
    return (~(scores < own)).sum(axis=1) - 1  # without the label itself


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Returns the share of rows whose label is among the ``k`` best of ``scores``. See :func:`label_ranks` for ties."""
    return float((label_ranks(scores, labels) < k).mean())


class Classified(NamedTuple):
    """The K = min(5, C) best classes of each image.

    Attributes:
      best: class indices, int32 ``[M, K]``, the best first. A label ranks after classes that tie with it.
      probabilities: of ``best``, float32 ``[M, K]``.
    """

    best: np.ndarray
    probabilities: np.ndarray


def classify(
    image_embeddings: np.ndarray,
    weights: np.ndarray,
    logit_scale: float,
    class_names: Sequence[str],
    labels: np.ndarray | None,
) -> Classified:
    """Classifies images by their embeddings, in blocks of images.

    Args:
      image_embeddings: ``[M, D]``, of unit length.
      weights: of the classifier, ``[C, D]``, of unit length.
      logit_scale: the factor of cosines before the softmax.
      class_names: of the C classes. Two classes of one name, as in ImageNet, cannot be distinguished: the first of them
        is the answer, as with an arg max.
      labels: int ``[M]``, or None if an image may have several.
    """
    candidates, count = Candidates(weights), min(TOP, len(weights))
    _, name_of = np.unique(np.asarray(class_names), return_inverse=True)  # [C], equal for equal names
    block = max(1, BLOCK_BYTES // (8 * len(weights)))
    best, probabilities = [], []
    for start in range(0, len(image_embeddings), block):
        scores = candidates.scores(image_embeddings[start : start + block]).astype(np.float64)  # [block, C]
        order = scores.copy()
        if labels is not None:
            own_name = name_of == name_of[labels[start : start + block]][:, None]  # [block, C]
            order -= 1e-12 * own_name  # far below the difference of any two float32 cosines
        found = np.argsort(-order, axis=1, kind="stable")[:, :count]
        exponentials = np.exp(logit_scale * (scores - scores.max(axis=1, keepdims=True)))
        softmax = exponentials / exponentials.sum(axis=1, keepdims=True)
        best.append(found.astype(np.int32))
        probabilities.append(np.take_along_axis(softmax, found, axis=1).astype(np.float32))
    return Classified(np.concatenate(best), np.concatenate(probabilities))


def single_label_metrics(classified: Classified, labels: np.ndarray) -> dict[str, float]:
    """Returns ``top_1``, ``top_5`` (from five classes on), ``mean_per_class`` and ``calibration_error``."""
    correct = classified.best == labels[:, None]  # [M, K]
    metrics = {"top_1": float(correct[:, 0].mean())}
    if classified.best.shape[1] == TOP:
        metrics["top_5"] = float(correct.any(axis=1).mean())
    metrics["mean_per_class"] = mean_per_class_accuracy(classified.best[:, 0], labels)
    metrics["calibration_error"] = float(calibration(classified.probabilities[:, 0], correct[:, 0])[0])
    return metrics


def multi_label_metrics(image_embeddings: np.ndarray, weights: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Returns ``average_precision_11`` of targets bool ``[M, C]``."""
    return {"average_precision_11": average_precision_11(Candidates(weights).scores(image_embeddings), targets)}


def two_class_metrics(image_embeddings: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns ``roc_auc`` of labels 0 and 1; the score is the cosine with class 1 minus that with class 0."""
    scores = Candidates(weights).scores(image_embeddings)
    return {"roc_auc": roc_auc(scores[:, 1] - scores[:, 0], labels)}


def rank_metrics(ranks: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, float]:
    """Returns ``top_1``, ``top_5`` (from five classes on) and ``mean_per_class``.

    Args:
      ranks: of each row's label, int ``[M]``, from :func:`label_ranks`.
      labels: int ``[M]``.
      num_classes: C.
    """
    correct = ranks < 1
    top_5 = {"top_5": float((ranks < TOP).mean())} if num_classes >= TOP else {}
    mean_per_class = mean_per_class_accuracy(np.where(correct, labels, -1), labels)
    return {"top_1": float(correct.mean())} | top_5 | {"mean_per_class": mean_per_class}


def largest_class_ranks(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the rank of each label, int ``[M]``, in the order of class sizes, the largest class first.

    No constant answer is right more often than the largest class. A useful classifier exceeds it.
    """
    order = np.argsort(-np.bincount(labels, minlength=num_classes), kind="stable")
    return np.argsort(order)[labels]


def nearest_mean_image_scores(
    images: np.ndarray, training_images: np.ndarray, training_labels: np.ndarray, num_classes: int
) -> np.ndarray:
    """Returns the scores of a baseline: minus the squared pixel distance to each class's mean training image.

    Args:
      images: uint8 ``[M, S, S, 3]``, to be classified.
      training_images: uint8 ``[T, S, S, 3]``.
      training_labels: int ``[T]``, in ``[0, num_classes)``.
      num_classes: C.

    Returns:
      float32 ``[M, C]``, up to a constant for each row; minus infinity for a class without training images.
    """

    def flat(block: np.ndarray) -> np.ndarray:
        return block.reshape(len(block), -1).astype(np.float32) / 255

    def blocks(array: np.ndarray) -> list[slice]:
        return [slice(start, start + 1024) for start in range(0, len(array), 1024)]

    counts = np.bincount(training_labels, minlength=num_classes)
    means = np.zeros((num_classes, training_images[0].size), np.float32)
    for block in blocks(training_images):
        np.add.at(means, training_labels[block], flat(training_images[block]))
    means /= np.maximum(counts, 1)[:, None]
    squares = np.square(means).sum(axis=1)
    scores = np.concatenate([2 * flat(images[block]) @ means.T - squares for block in blocks(images)])
    scores[:, counts == 0] = -np.inf
    return scores
