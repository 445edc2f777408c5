"""Zero-shot classification (section 3.1.2 and 3.1.4 of the paper), and a baseline that needs no learning."""

import json
from collections.abc import Callable, Sequence
from importlib import resources
from typing import NamedTuple

import numpy as np

from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.metrics import average_precision_11, calibration, mean_per_class_accuracy, roc_auc
from clip_jax.evaluation.remembered import Classifier
from clip_jax.evaluation.results import TOP
from clip_jax.evaluation.similarity import Candidates

BLOCK_BYTES = 2**26  # of scores that are held at a time


class Prompts(NamedTuple):
    """A file of ``prompts/``; ``class_names`` and ``labels``, which go together, may be empty."""

    templates: tuple[str, ...]
    class_names: tuple[str, ...]
    labels: tuple[str, ...]


def load_prompts(name: str) -> Prompts:
    """The prompts of ``clip_jax/evaluation/prompts/<name>.json``; in templates ``{}`` stands for the class's name.

    Raises:
      ValueError: there is no such file; the message lists those that there are.
    """
    folder = resources.files("clip_jax.evaluation") / "prompts"
    files = {entry.name.removesuffix(".json"): entry for entry in folder.iterdir()}
    if name not in files:
        raise ValueError(f"no prompts {name!r}; there are {', '.join(sorted(files))}")
    content = json.loads(files[name].read_text(encoding="utf-8"))
    return Prompts(*(tuple(content.get(key, ())) for key in Prompts._fields))


def classifier_weights(
    encode_text: Callable[[Sequence[str]], np.ndarray], names: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """One unit vector a class, float32 ``[C, D]``: the mean over templates of its text_embeddings, normalised again."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    embeddings = encode_text(prompts).reshape(len(names), len(templates), -1)  # [C, T, D]
    mean = embeddings.mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def classifier_of(embedder: Embedder) -> Classifier:
    """From class names and templates to :func:`classifier_weights`; raises FloatingPointError if one is not finite."""

    def classifier(class_names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        weights = classifier_weights(embedder.encode_text, class_names, templates)
        if not np.isfinite(weights).all():
            raise FloatingPointError("the embeddings of the class names are not finite; the weights are damaged")
        return weights

    return classifier


def label_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes stand before each row's label: int ``[M]`` from scores ``[M, C]`` and labels int ``[M]``.

    A tie counts against the label, so a model that gives every class the same score is never right; so does a score
    that is not a number.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)  # [M, 1]
    # "Not below" instead of "at least": true for a score that isn't a number, which so ranks first.
    return (~(scores < own)).sum(axis=1) - 1  # without the label itself


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of rows whose label is among the ``k`` best of scores ``[M, C]``; ties as in :func:`label_ranks`."""
    return float((label_ranks(scores, labels) < k).mean())


class Classified(NamedTuple):
    """The K = min(5, C) best classes of each picture int32 ``[M, K]``, and their probabilities float32 ``[M, K]``.

    The label stands after classes that tie with it, so that what is counted from ``best`` is what the metrics say.
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
    """Image_embeddings ``[M, D]`` by a classifier ``[C, D]``, both of unit length, in blocks of pictures.

    Args:
      logit_scale: what cosines are multiplied by before the softmax.
      class_names: of the C classes. Two of one name, as ImageNet has, cannot be told apart by anybody: the first of
        them is then the answer, as it is of an arg max.
      labels: int ``[M]``, or None where a picture may have several.
    """
    among, count = Candidates(weights), min(TOP, len(weights))
    _, name_of = np.unique(np.asarray(class_names), return_inverse=True)  # [C], equal for equal names
    block = max(1, BLOCK_BYTES // (8 * len(weights)))
    best, probabilities = [], []
    for start in range(0, len(image_embeddings), block):
        scores = among.scores(image_embeddings[start : start + block]).astype(np.float64)  # [block, C]
        order = scores.copy()
        if labels is not None:
            own_name = name_of == name_of[labels[start : start + block]][:, None]  # [block, C]
            order -= 1e-12 * own_name  # far less than what tells two float32 cosines apart
        found = np.argsort(-order, axis=1, kind="stable")[:, :count]
        exponentials = np.exp(logit_scale * (scores - scores.max(axis=1, keepdims=True)))
        shares = exponentials / exponentials.sum(axis=1, keepdims=True)
        best.append(found.astype(np.int32))
        probabilities.append(np.take_along_axis(shares, found, axis=1).astype(np.float32))
    return Classified(np.concatenate(best), np.concatenate(probabilities))


def single_label_metrics(classified: Classified, labels: np.ndarray) -> dict[str, float]:
    """``top_1``, ``top_5`` where there are five classes or more, ``mean_per_class`` and ``calibration_error``."""
    right = classified.best == labels[:, None]  # [M, K]
    metrics = {"top_1": float(right[:, 0].mean())}
    if classified.best.shape[1] == TOP:
        metrics["top_5"] = float(right.any(axis=1).mean())
    metrics["mean_per_class"] = mean_per_class_accuracy(classified.best[:, 0], labels)
    metrics["calibration_error"] = float(calibration(classified.probabilities[:, 0], right[:, 0])[0])
    return metrics


def multi_label_metrics(image_embeddings: np.ndarray, weights: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """``average_precision_11`` of targets bool ``[M, C]``, each class by itself."""
    return {"average_precision_11": average_precision_11(Candidates(weights).scores(image_embeddings), targets)}


def two_class_metrics(image_embeddings: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """``roc_auc`` of labels 0 and 1, by how much more a picture resembles the second class."""
    scores = Candidates(weights).scores(image_embeddings)
    return {"roc_auc": roc_auc(scores[:, 1] - scores[:, 0], labels)}


def rank_metrics(ranks: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, float]:
    """``top_1``, ``top_5`` where there are five classes or more, and ``mean_per_class``.

    Args:
      ranks: how many classes stand before each row's label, int ``[M]``; :func:`label_ranks` gives them.
      labels: int ``[M]``.
    """
    right = ranks < 1
    top_5 = {"top_5": float((ranks < TOP).mean())} if num_classes >= TOP else {}
    mean_per_class = mean_per_class_accuracy(np.where(right, labels, -1), labels)
    return {"top_1": float(right.mean())} | top_5 | {"mean_per_class": mean_per_class}


def largest_class_ranks(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Ranks int ``[M]`` where every answer is the largest class of labels int ``[M]``, the next one second, and so on.

    No other constant answer is right more often, so a classifier that does not beat it has learned nothing useful.
    """
    order = np.argsort(-np.bincount(labels, minlength=num_classes), kind="stable")
    return np.argsort(order)[labels]


def nearest_mean_picture_scores(
    pictures: np.ndarray, training_pictures: np.ndarray, training_labels: np.ndarray, num_classes: int
) -> np.ndarray:
    """The trivial baseline: minus the squared pixel distance to each class's mean training picture.

    Args:
      pictures: uint8 ``[M, S, S, 3]`` to classify.
      training_pictures: uint8 ``[T, S, S, 3]``.
      training_labels: int ``[T]``, in ``[0, num_classes)``.

    Returns:
      float32 ``[M, C]``, up to a constant a row; minus infinity for a class without training pictures.
    """

    def flat(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float32) / 255

    def blocks(images: np.ndarray) -> list[slice]:
        return [slice(start, start + 1024) for start in range(0, len(images), 1024)]

    counts = np.bincount(training_labels, minlength=num_classes)
    means = np.zeros((num_classes, training_pictures[0].size), np.float32)
    for block in blocks(training_pictures):
        np.add.at(means, training_labels[block], flat(training_pictures[block]))
    means /= np.maximum(counts, 1)[:, None]
    squares = np.square(means).sum(axis=1)
    scores = np.concatenate([2 * flat(pictures[block]) @ means.T - squares for block in blocks(pictures)])
    scores[:, counts == 0] = -np.inf
    return scores
