"""Opens the data of a zero-shot classification task, and scores models on it."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from clip_jax.data.sources import JOIN
from clip_jax.data.sources.digest import digest
from clip_jax.data.sources.fields import split_options
from clip_jax.evaluation.cached import Classifier
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.images import Annotation, Images, open_on_all_hosts, read_annotations
from clip_jax.evaluation.labels import check_names, choose_rows, match_classes, no_match_message
from clip_jax.evaluation.linear_probe import Split, linear_probe
from clip_jax.evaluation.measuring import Extras, require_finite, under_corruptions
from clip_jax.evaluation.metrics import average_precision_11, roc_auc
from clip_jax.evaluation.results import TaskResult
from clip_jax.evaluation.similarity import num_copies, num_ties
from clip_jax.evaluation.task import Task
from clip_jax.evaluation.zero_shot import (
    Prompts,
    classify,
    label_ranks,
    largest_class_ranks,
    load_prompts,
    multi_label_metrics,
    nearest_mean_image_scores,
    rank_metrics,
    single_label_metrics,
    two_class_metrics,
)
from clip_jax.models.preprocessing import Preprocessing

RANDOM_RANKINGS = 20  # their mean estimates the chance level of average precision
BASELINE_SIDE = 32  # px; a mean of many images has no finer detail


class LabeledImages(NamedTuple):
    """Images of a source, the class indices of each, and notes on labels and records that were left out."""

    images: Images
    classes: list[list[int]]
    notes: list[str]

    @property
    def labels(self) -> np.ndarray:
        """The class indices int32 ``[M]``, if every image has one class."""
        return np.array(self.classes, np.int32)[:, 0]


class ClassificationTask:
    """A labeled set of images and its prompts. :mod:`clip_jax.evaluation.labels` matches labels with class names.

    Args:
      task: a task of kind ``zero_shot``.
      image_size: the model's, in pixels.
      data: the folder that replaces ``{data}`` in sources.
      preprocessing: the model's.

    Raises:
      FileNotFoundError: the data, or the package that reads it, is missing.
      ValueError: class names, labels, images or metric do not match each other; one line.
    """

    def __init__(self, task: Task, image_size: int, data: str, preprocessing: Preprocessing):
        self.task, self._image_size, self._data, self._preprocessing = task, image_size, data, preprocessing
        self._several = task.metric == "average_precision_11"
        source = task.source.replace("{data}", data)
        prompts = load_prompts(task.prompts) if task.prompts else read_shard_prompts(source)
        self._templates = task.templates or prompts.templates or ("{}",)
        wrong = [template for template in self._templates if template.count("{}") != 1]
        if wrong:
            raise ValueError(f"the template {wrong[0]!r} must have one {{}} for the class name")
        self.class_names = list(task.class_names or prompts.class_names)
        self._labels = list(task.labels or (() if task.class_names else prompts.labels))
        check_names(self.class_names, self._labels)
        annotations, images, fingerprint = self._open(task.source)
        empty = []
        if not self.class_names:
            # As labels too: otherwise numbers of another source would match as indices, in an order that no one stated.
            self.class_names = self._labels = _own_classes(annotations)
            empty = _empty_folders(source, self.class_names)
        self._check_class_count()
        self.images, self._classes, self._notes = self._label(annotations, images)
        self._check_metric_has_images()
        self._notes += [*empty, *_same_names(self.class_names)]
        self._identity = {
            "images": digest(fingerprint, len(self.images)),
            "classes": digest(self.class_names, self._classes),
            "templates": digest(list(self._templates)),
        }
        self._baseline = self._other_source("pixel_baseline") if task.pixel_baseline else None

    def _open(self, source: str) -> tuple[list[Annotation], Images, str]:
        source = source.replace("{data}", self._data)
        opened = open_on_all_hosts(source)
        images = Images(source, opened, self._image_size, self._preprocessing)
        return read_annotations(source, opened), images, opened.fingerprint()

    def _label(self, annotations: list[Annotation], images: Images, other: bool = False) -> LabeledImages:
        """Returns the images of the task's classes. ``other``: images of other classes are left out and counted."""
        found = dict.fromkeys(label for annotation in annotations for label in annotation.labels)
        matching = match_classes(found, self.class_names, self._labels)
        if matching.unknown and (not matching.index_of or not (other or self.task.other_classes)):
            raise ValueError(no_match_message(matching.unknown, len(found), self.class_names, self._labels))
        answers = "cannot be its answers" if other else "remain possible answers"
        rows = choose_rows(annotations, matching, self.class_names, self._several, answers)
        return LabeledImages(images.select(rows.rows), rows.classes, rows.notes)

    def _other_source(self, key: str) -> LabeledImages:
        """Opens ``train``, ``validation`` or ``pixel_baseline``. Its notes and errors begin with the key."""
        source = getattr(self.task, key)
        try:
            annotations, images, _ = self._open(source)
            labeled = self._label(annotations, images, other=True)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{key}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{key}={source}: {error}") from None
        own = ["these are the task's own images, so its numbers do not hold for other images"]
        notes = (own if source == self.task.source else []) + labeled.notes
        return labeled._replace(notes=[f"{key}: {note}" for note in notes])

    def _check_class_count(self) -> None:
        count, metric = len(self.class_names), self.task.metric
        if (metric in ("top_5", "mean_top_1_top_5") and count < 5) or (metric == "roc_auc" and count != 2):
            raise ValueError(f"metric={metric!r} cannot be computed for {count} classes")

    def _check_metric_has_images(self) -> None:
        if self.task.metric not in ("average_precision_11", "roc_auc"):
            return
        present = {index for indices in self._classes for index in indices}
        absent = [name for index, name in enumerate(self.class_names) if index not in present]
        if absent:
            raise ValueError(
                f"{self.task.metric} needs images of every class, and {len(absent)} of {len(self.class_names)} have "
                f"none, such as {absent[0]!r}; leave them out of class_names"
            )

    def score(self, embedder: Embedder, classifier: Classifier, extras: Extras) -> TaskResult:
        """Scores the embedder's model. Raises ValueError or FloatingPointError, one line, if that fails."""
        splits, probe_notes = self._probe_splits() if extras.linear_probe else ([], [])
        weights = classifier(self.class_names, self._templates)
        metrics, arrays, equal = self._measure(embedder, weights, self.images)
        shift = {}
        if extras.synthetic_shift:
            shift = under_corruptions(self.images, lambda images: self._main(embedder, weights, images))
        probe, why_not = self._probe(embedder, splits) if splits else ({}, [])
        baseline, baseline_notes = {}, []
        if extras.baseline and self._baseline:
            baseline, baseline_notes = self._nearest_mean_image(), self._baseline.notes
        own = [self.task.note] if self.task.note else []
        notes = [*own, *self._notes, *equal, *_equal_classes(weights, self.class_names), *baseline_notes]
        return TaskResult(
            self.task.name,
            self.task.title or self.task.name,
            self.task.kind,
            self.task.metric,
            metrics,
            {"images": len(self.images), "classes": len(self.class_names)},
            chance=self._chance(),
            largest_class=self._largest_class(),
            baseline=baseline,
            synthetic_shift=shift,
            linear_probe=probe,
            notes=[*notes, *probe_notes, *why_not],
            identity=self._identity,
            class_names=self.class_names,
            arrays=arrays,
            image_at=self.images.__getitem__,
        )

    def _main(self, embedder: Embedder, weights: np.ndarray, images: Images) -> float:
        return self._measure(embedder, weights, images)[0][self.task.metric]

    def _measure(self, embedder: Embedder, weights: np.ndarray, images: Images) -> tuple[dict, dict, list[str]]:
        """Returns metrics, arrays of the result, and notes on images with equal embeddings."""
        embeddings = require_finite(embedder.encode_image(images))
        equal = num_copies(embeddings)
        notes = [f"{equal:,} of {len(embeddings):,} images have the same embedding as an earlier one"] if equal else []
        if self._several:
            classified = classify(embeddings, weights, embedder.logit_scale, self.class_names, None)
            return multi_label_metrics(embeddings, weights, self._targets()), classified._asdict(), notes
        labels = self._label_array()
        classified = classify(embeddings, weights, embedder.logit_scale, self.class_names, labels)
        metrics = self._with_mean(single_label_metrics(classified, labels))
        if self.task.metric == "roc_auc":
            metrics |= two_class_metrics(embeddings, weights, labels)
        contradicting = num_ties(embeddings, labels)
        if contradicting:
            notes.append(f"{contradicting:,} images have the same embedding as an image of another class")
        return metrics, classified._asdict() | {"labels": labels}, notes

    def _label_array(self) -> np.ndarray:
        return np.array(self._classes, np.int32)[:, 0]

    def _targets(self) -> np.ndarray:
        """Returns the classes of each image, bool ``[M, C]``."""
        targets = np.zeros((len(self._classes), len(self.class_names)), bool)
        for row, classes in enumerate(self._classes):
            targets[row, classes] = True
        return targets

    def _with_mean(self, metrics: dict[str, float]) -> dict[str, float]:
        if self.task.metric == "mean_top_1_top_5":
            metrics["mean_top_1_top_5"] = (metrics["top_1"] + metrics["top_5"]) / 2
        return metrics

    def _chance(self) -> dict[str, float]:
        count = len(self.class_names)
        if self._several:
            # Above the share of images of the class, since the precision is interpolated.
            targets, random = self._targets(), np.random.default_rng(0)
            draws = [average_precision_11(random.random(targets.shape), targets) for _ in range(RANDOM_RANKINGS)]
            return {"average_precision_11": float(np.mean(draws))}
        top = {f"top_{k}": k / count for k in (1, 5) if k <= count}
        main = {"roc_auc": 0.5, "mean_top_1_top_5": sum(top.values()) / 2}
        return top | {"mean_per_class": 1 / count} | {k: v for k, v in main.items() if k == self.task.metric}

    def _largest_class(self) -> dict[str, float]:
        """Returns the metrics of one answer for all images: the classes in the order of their size."""
        if self._several:
            targets = self._targets()
            return {"average_precision_11": average_precision_11(np.zeros(targets.shape), targets)}
        labels, count = self._label_array(), len(self.class_names)
        metrics = self._with_mean(rank_metrics(largest_class_ranks(labels, count), labels, count))
        return metrics | ({"roc_auc": 0.5} if self.task.metric == "roc_auc" else {})

    def _nearest_mean_image(self) -> dict[str, float]:
        labels, count = self._label_array(), len(self.class_names)
        scores = nearest_mean_image_scores(
            thumbnails(self.images), thumbnails(self._baseline.images), self._baseline.labels, count
        )
        metrics = self._with_mean(rank_metrics(label_ranks(scores, labels), labels, count))
        if self.task.metric == "roc_auc" and np.isfinite(scores).all():
            metrics["roc_auc"] = roc_auc(scores[:, 1] - scores[:, 0], labels)
        return metrics

    def _probe_splits(self) -> tuple[list[LabeledImages], list[str]]:
        """Returns the training and validation images of the linear probe, or none and a note with the reason."""
        if self._several or not self.task.train:
            why = "images have several classes" if self._several else "the task has no training split"
            return [], [f"no linear probe: {why}"]
        try:
            splits = [self._other_source(key) for key in ("train", "validation") if getattr(self.task, key)]
        except FileNotFoundError as error:
            return [], [f"no linear probe: {error}"]
        return splits, [f"linear probe, {note}" for split in splits for note in split.notes]

    def _probe(self, embedder: Embedder, splits: list[LabeledImages]) -> tuple[dict[str, float], list[str]]:
        train, *validation = [
            Split(require_finite(embedder.image_features(split.images)), split.labels) for split in splits
        ]
        test = Split(require_finite(embedder.image_features(self.images)), self._label_array())
        try:
            return linear_probe(train, test, len(self.class_names), embedder.mesh, *validation), []
        except ValueError as error:  # too few images or classes
            return {}, [f"no linear probe: {error}"]


def _own_classes(annotations: Sequence[Annotation]) -> list[str]:
    """Returns the labels of a source as class names, in order of occurrence."""
    found = list(dict.fromkeys(label for annotation in annotations for label in annotation.labels))
    if found and all(label.isdecimal() for label in found):
        raise ValueError("its classes are numbers; give class_names in the order of the numbers")
    if not found:
        raise ValueError(f"none of its {len(annotations):,} images has a class; name its field with ?label=")
    return found


def _empty_folders(source: str, class_names: Sequence[str]) -> list[str]:
    """Returns a note on folders of an image_folder without images: they are not classes."""
    kind, _, where = source.partition(":")
    if kind != "image_folder" or JOIN in source:
        return []
    folder = pathlib.Path(split_options(where)[0])
    empty = sorted({entry.name for entry in folder.iterdir() if entry.is_dir()} - set(class_names))
    if not empty:
        return []
    return [f"{len(empty):,} folders have no image that can be read and are not classes, such as {empty[0]!r}"]


def _same_names(class_names: Sequence[str]) -> list[str]:
    twice = sorted({name for name in class_names if class_names.count(name) > 1})
    if len(set(class_names)) == len(class_names):
        return []
    return [
        f"{len(twice)} class names belong to several classes each, such as {twice[0]!r}: the first is the answer, and "
        "images of the others count as wrong"
    ]


def _equal_classes(weights: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """Returns a note on classes of different names with equal text embeddings: a tie counts as wrong."""
    _, name_of = np.unique(np.asarray(class_names), return_inverse=True)
    equal = num_ties(weights, name_of)
    if not equal:
        return []
    return [
        f"{equal:,} of {len(weights):,} classes have the same text embedding as a class of another name, so "
        "images of these classes count as wrong; the tokenizer ignores case and cuts long texts"
    ]


def read_shard_prompts(source: str) -> Prompts:
    """Returns the class names and templates in files next to the tars, as in CLIP_benchmark; empty without files."""
    if not source.startswith("wds:"):
        return Prompts((), (), ())
    folder = pathlib.Path(source.removeprefix("wds:").partition("?")[0]).parent

    def lines(name: str) -> tuple[str, ...]:
        files = [parent / name for parent in (folder, folder.parent) if (parent / name).is_file()]
        return tuple(files[0].read_text(encoding="utf-8-sig").splitlines()) if files else ()

    templates = tuple(line.replace("{c}", "{}") for line in lines("zeroshot_classification_templates.txt") if line)
    return Prompts(templates, lines("classnames.txt"), ())


def thumbnails(images: Images) -> np.ndarray:
    """Returns the images resized to at most 32 pixels: uint8 ``[M, S, S, 3]``."""
    side = min(BASELINE_SIDE, images.blank_image.shape[0])
    result = np.empty((len(images), side, side, 3), np.uint8)
    for index, image in enumerate(images):
        result[index] = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
    return result
