"""The evaluations that a config names, loaded once and scored as often as wanted."""

import dataclasses
from typing import NamedTuple

import ml_collections
import numpy as np

from clip_jax.data.images import ImageError, decode_image, evaluation_transform
from clip_jax.data.sources import Pair, PairError, open_source
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.retrieval import RECALL_AT, retrieval_metrics
from clip_jax.evaluation.zero_shot import (
    classifier_weights,
    load_templates,
    nearest_mean_picture_scores,
    top_k_accuracy,
)


class LabelledPictures(NamedTuple):
    """uint8 ``images`` ``[M, S, S, 3]`` and, for each, its index among ``names``."""

    images: np.ndarray
    labels: np.ndarray
    names: list[str]


@dataclasses.dataclass(frozen=True)
class EvaluationResults:
    """What a model scored; each part is None or empty where the config names no data for it.

    ``zero_shot`` and ``pixel_baseline`` have ``top_1`` and ``top_5``; ``retrieval`` has recalls by the name of the
    set; ``scores`` is float32 ``[M, C]``, the cosine of each picture with each class.
    """

    zero_shot: dict[str, float] | None
    pixel_baseline: dict[str, float] | None
    retrieval: dict[str, dict[str, float]]
    scores: np.ndarray | None

    def as_dict(self) -> dict:
        """All but the scores, for JSON."""
        return {"zero_shot": self.zero_shot, "pixel_baseline": self.pixel_baseline, "retrieval": self.retrieval}

    def scalars(self) -> dict[str, float]:
        """Every metric by one name, for curves."""
        flat = {f"zero_shot/{name}": value for name, value in (self.zero_shot or {}).items()}
        for task, metrics in self.retrieval.items():
            flat |= {f"retrieval/{task}/{name}": value for name, value in metrics.items()}
        return flat

    def line(self) -> str:
        """The most telling numbers, for the log during training."""
        parts = []
        if self.zero_shot:
            parts.append(f"zero-shot top-1 {self.zero_shot['top_1']:.1%}  top-5 {self.zero_shot['top_5']:.1%}")
        parts += [
            f"{task} image-to-text R@1 {metrics['image_to_text_recall@1']:.1%}"
            for task, metrics in self.retrieval.items()
        ]
        return "  ".join(parts)

    def table(self) -> str:
        """Everything, as the lines that a finished run prints."""
        lines = []
        if self.zero_shot:
            rows = {"CLIP": self.zero_shot, "nearest mean picture": self.pixel_baseline}
            chance = {f"top_{k}": k / self.zero_shot["classes"] for k in (1, 5)}
            lines.append(f"{'zero-shot, ' + format(self.zero_shot['classes'], ',') + ' classes':48}  top-1   top-5")
            for name, metrics in (rows | {"chance": chance}).items():
                if metrics:
                    lines.append(f"  {name:46} {metrics['top_1']:6.2%}  {metrics['top_5']:6.2%}")
        for task, metrics in self.retrieval.items():
            lines.append(f"{'retrieval, ' + task:48}    R@1     R@5    R@10")
            for direction in ("image_to_text", "text_to_image"):
                recalls = "  ".join(f"{metrics[f'{direction}_recall@{k}']:6.2%}" for k in RECALL_AT)
                lines.append(f"  {direction.replace('_', ' '):46} {recalls}")
            chances = "  ".join(f"{k / metrics['texts']:6.2%}" for k in RECALL_AT)
            lines.append(f"  {'chance':46} {chances}")
        return "\n".join(lines)


def _load_pairs(name: str, image_size: int) -> tuple[list[Pair], np.ndarray]:
    """All pairs of a source and their pictures, uint8 ``[M, S, S, 3]``.

    Raises:
      ValueError: a picture cannot be decoded. Nothing may take its place here: the result would be another.
    """
    source = open_source(name)
    try:
        pairs = [source[index] for index in range(len(source))]
    except PairError as error:
        raise ValueError(f"evaluation data {name}: {error}") from None
    if not pairs:
        raise ValueError(f"evaluation data {name} has no pairs")
    images = np.zeros((len(pairs), image_size, image_size, 3), np.uint8)
    for index, pair in enumerate(pairs):
        try:
            images[index] = evaluation_transform(decode_image(pair.image), image_size)
        except ImageError as error:
            raise ValueError(f"evaluation data {name}: {pair.key}: {error}") from None
    return pairs, images


def load_labelled(name: str, image_size: int, names: list[str] | None = None) -> LabelledPictures:
    """A source with labels; the classes are ``names``, or else all labels that occur, in order of occurrence.

    Raises:
      ValueError: a picture has no label or one that isn't among ``names``.
    """
    pairs, images = _load_pairs(name, image_size)
    unlabelled = [pair.key for pair in pairs if not pair.label]
    if unlabelled:
        raise ValueError(f"evaluation data {name}: {unlabelled[0]} has no label")
    classes = names or list(dict.fromkeys(pair.label for pair in pairs))
    index = {label: position for position, label in enumerate(classes)}
    unknown = [pair.label for pair in pairs if pair.label not in index]
    if unknown:
        raise ValueError(f"evaluation data {name}: {unknown[0]!r} is not among the {len(classes)} classes")
    return LabelledPictures(images, np.array([index[pair.label] for pair in pairs]), classes)


class Evaluations:
    """Everything under ``config.evaluation``.

    Raises:
      ValueError, FileNotFoundError: data or templates are missing or broken.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        evaluation, image_size = config.evaluation, config.model.vision.image_size
        self.zero_shot: LabelledPictures | None = None
        self._baseline: LabelledPictures | None = None
        self._templates = load_templates(evaluation.templates)
        if evaluation.zero_shot:
            self.zero_shot = load_labelled(evaluation.zero_shot, image_size)
            if evaluation.pixel_baseline:
                self._baseline = load_labelled(evaluation.pixel_baseline, image_size, self.zero_shot.names)
        self._retrieval = {
            name: _load_pairs(source, image_size) for name, source in evaluation.retrieval.items() if source
        }

    def __bool__(self) -> bool:
        return self.zero_shot is not None or bool(self._retrieval)

    def score(self, embedder: Embedder, with_baseline: bool = False) -> EvaluationResults:
        """Scores the embedder's model on everything; ``with_baseline`` adds the nearest mean picture's accuracies."""
        zero_shot = baseline = scores = None
        if self.zero_shot:
            weights = classifier_weights(embedder.encode_text, self.zero_shot.names, self._templates)
            scores = embedder.encode_image(self.zero_shot.images) @ weights.T
            zero_shot = self._accuracies(scores) | {"classes": len(self.zero_shot.names)}
        if with_baseline and self._baseline:
            baseline = self._accuracies(
                nearest_mean_picture_scores(
                    self.zero_shot.images, self._baseline.images, self._baseline.labels, len(self.zero_shot.names)
                )
            )
        retrieval = {name: self._retrieve(embedder, *task) for name, task in self._retrieval.items()}
        return EvaluationResults(zero_shot, baseline, retrieval, scores)

    def _accuracies(self, scores: np.ndarray) -> dict[str, float]:
        return {f"top_{k}": top_k_accuracy(scores, self.zero_shot.labels, k) for k in (1, 5)}

    def _retrieve(self, embedder: Embedder, pairs: list[Pair], images: np.ndarray) -> dict[str, float]:
        """Recall in both directions; the text of a picture is its first caption, which several may share."""
        captions = list(dict.fromkeys(pair.captions[0] for pair in pairs))
        index = {caption: position for position, caption in enumerate(captions)}
        image_ids = np.array([index[pair.captions[0]] for pair in pairs])
        image_embeddings, text_embeddings = embedder.encode_image(images), embedder.encode_text(captions)
        recalls = retrieval_metrics(image_embeddings, text_embeddings, image_ids, np.arange(len(captions)))
        return recalls | {"images": len(pairs), "texts": len(captions)}
