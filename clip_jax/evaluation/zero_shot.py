"""Zero-shot classification (section 3.1.2 and 3.1.4 of the paper), and a baseline that needs no learning."""

import json
from collections.abc import Callable, Sequence
from importlib import resources

import numpy as np


def load_templates(name: str) -> list[str]:
    """The prompt templates of ``clip_jax/evaluation/prompts/<name>.json``; ``{}`` stands for the class's name.

    Raises:
      ValueError: there is no such file; the message lists those that there are.
    """
    folder = resources.files("clip_jax.evaluation") / "prompts"
    file = folder / f"{name}.json"
    if not file.is_file():
        names = ", ".join(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir()))
        raise ValueError(f"no prompt templates {name!r}; there are {names}")
    return json.loads(file.read_text(encoding="utf-8"))


def classifier_weights(
    encode_text: Callable[[Sequence[str]], np.ndarray], names: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """One unit vector a class, float32 ``[C, D]``: the mean over templates of its text_embeddings, normalised again."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    embeddings = encode_text(prompts).reshape(len(names), len(templates), -1)  # [C, T, D]
    mean = embeddings.mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of rows whose label is among the ``k`` best of scores ``[M, C]``.

    A tie counts against the label, so a model that gives every class the same score is never right; so does a score
    that is not a number.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)  # [M, 1]
    # "Not below" instead of "at least": true for a score that isn't a number, which so ranks first.
    at_least_as_good = (~(scores < own)).sum(axis=1)  # the label itself included
    return float((at_least_as_good <= k).mean())


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

    counts = np.bincount(training_labels, minlength=num_classes)
    means = np.zeros((num_classes, flat(pictures[:1]).shape[1]), np.float32)
    np.add.at(means, training_labels, flat(training_pictures))
    means /= np.maximum(counts, 1)[:, None]
    scores = 2 * flat(pictures) @ means.T - np.square(means).sum(axis=1)
    scores[:, counts == 0] = -np.inf
    return scores
