"""A classification task with its data: classes, images, baselines, and the linear probe."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from clip_jax.data.sources import JOIN
from clip_jax.data.sources.digest import digest
from clip_jax.data.sources.fields import split_options
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.labels import check_names, choose_rows, match_classes, no_match
from clip_jax.evaluation.linear_probe import Split, linear_probe
from clip_jax.evaluation.measuring import Extras, finite, under_corruptions
from clip_jax.evaluation.metrics import average_precision_11, roc_auc
from clip_jax.evaluation.pictures import Pictures, Said, open_on_all_hosts, read_said
from clip_jax.evaluation.registry import Task
from clip_jax.evaluation.remembered import Classifier
from clip_jax.evaluation.results import TaskResult
from clip_jax.evaluation.similarity import copies, ties
from clip_jax.evaluation.zero_shot import (
    Prompts,
    classify,
    label_ranks,
    largest_class_ranks,
    load_prompts,
    multi_label_metrics,
    nearest_mean_picture_scores,
    rank_metrics,
    single_label_metrics,
    two_class_metrics,
)
from clip_jax.models.preprocessing import Preprocessing

RANDOM_RANKINGS = 20  # whose mean is the chance of an average precision
BASELINE_SIDE = 32  # px; the mean of many images has no finer detail


class LabelledImages(NamedTuple):
    """Images of a source, the class numbers of each, and sentences about what was matched loosely or left out."""

    pictures: Pictures
    classes: list[list[int]]
    notes: list[str]

    @property
    def labels(self) -> np.ndarray:
        """int32 ``[M]``, where every image has one class."""
        return np.array(self.classes, np.int32)[:, 0]


class ClassificationTask:
    """A labelled set and its prompts. :mod:`clip_jax.evaluation.labels` has the rule by which labels are matched.

    Raises:
      FileNotFoundError: the data, or the package that reads it, is missing.
      ValueError: class names, labels, images and metric do not go together; one line.
    """

    def __init__(self, task: Task, image_size: int, data: str, preprocessing: Preprocessing):
        self.task, self._image_size, self._data, self._preprocessing = task, image_size, data, preprocessing
        self._several = task.metric == "average_precision_11"
        prompts = load_prompts(task.prompts) if task.prompts else beside_the_shards(task.source.replace("{data}", data))
        self._templates = task.templates or prompts.templates or ("{}",)
        wrong = [template for template in self._templates if template.count("{}") != 1]
        if wrong:
            raise ValueError(f"the template {wrong[0]!r} must have one {{}}, the place of the name")
        self.class_names = list(task.class_names or prompts.class_names)
        self._labels = list(task.labels or (() if task.class_names else prompts.labels))
        check_names(self.class_names, self._labels)
        said, pictures, fingerprint = self._open(task.source)
        empty = []
        if not self.class_names:
            # As labels, so that numbers of another source are not taken for indices into an order nobody gave.
            self.class_names = self._labels = _own_classes(said)
            empty = _empty_folders(task.source.replace("{data}", data), self.class_names)
        self._check_class_count()
        images = self._labelled(task.source, said, pictures)
        self.pictures, self._classes, self._notes = images.pictures, images.classes, images.notes
        self._check_metric_has_images()
        self._notes += [*empty, *_same_names(self.class_names)]
        self._identity = {
            "images": digest(fingerprint, len(self.pictures)),
            "classes": digest(self.class_names, self._classes),
            "templates": digest(list(self._templates)),
        }
        self._baseline = self._other_source("pixel_baseline") if task.pixel_baseline else None

    def _open(self, source: str) -> tuple[list[Said], Pictures, str]:
        source = source.replace("{data}", self._data)
        opened = open_on_all_hosts(source)
        pictures = Pictures(source, opened, self._image_size, self._preprocessing)
        return read_said(source, opened), pictures, opened.fingerprint()

    def _labelled(self, source: str, said: list[Said], pictures: Pictures, other: bool = False) -> LabelledImages:
        """The images of the task's classes. ``other`` sources may have more classes; they are left out and counted."""
        found = dict.fromkeys(label for one in said for label in one.labels)
        matching = match_classes(found, self.class_names, self._labels)
        if matching.unknown and (not matching.number_of or not (other or self.task.other_classes)):
            raise ValueError(no_match(matching.unknown, len(found), self.class_names, self._labels))
        answers = "cannot be its answers" if other else "remain possible answers"
        rows = choose_rows(said, matching, self.class_names, self._several, answers)
        return LabelledImages(pictures.chosen(rows.rows), rows.classes, rows.notes)

    def _other_source(self, key: str) -> LabelledImages:
        """Opens ``train``, ``validation`` or ``pixel_baseline``; its notes and errors begin with the key."""
        source = getattr(self.task, key)
        try:
            said, pictures, _ = self._open(source)
            images = self._labelled(source, said, pictures, other=True)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{key}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{key}={source}: {error}") from None
        own = ["these are the task's own images, so its numbers say nothing about other images"]
        notes = (own if source == self.task.source else []) + images.notes
        return images._replace(notes=[f"{key}: {note}" for note in notes])

    def _check_class_count(self) -> None:
        count, metric = len(self.class_names), self.task.metric
        if (metric in ("top_5", "mean_top_1_top_5") and count < 5) or (metric == "roc_auc" and count != 2):
            raise ValueError(f"{metric} is no metric of {count} classes")

    def _check_metric_has_images(self) -> None:
        if self.task.metric not in ("average_precision_11", "roc_auc"):
            return
        present = {number for numbers in self._classes for number in numbers}
        absent = [name for number, name in enumerate(self.class_names) if number not in present]
        if absent:
            raise ValueError(
                f"{self.task.metric} needs images of every class, and {len(absent)} of {len(self.class_names)} have "
                f"none, such as {absent[0]!r}; leave them out of class_names"
            )

    def score(self, embedder: Embedder, classifier: Classifier, extras: Extras) -> TaskResult:
        splits, probe_notes = self._probe_splits() if extras.linear_probe else ([], [])
        weights = classifier(self.class_names, self._templates)
        metrics, arrays, equal = self._measure(embedder, weights, self.pictures)
        shift = {}
        if extras.synthetic_shift:
            shift = under_corruptions(self.pictures, lambda pictures: self._main(embedder, weights, pictures))
        probe, why_not = self._probe(embedder, splits) if splits else ({}, [])
        baseline, baseline_notes = {}, []
        if extras.baseline and self._baseline:
            baseline, baseline_notes = self._nearest_mean_picture(), self._baseline.notes
        own = [self.task.note] if self.task.note else []
        notes = [*own, *self._notes, *equal, *_equal_classes(weights, self.class_names), *baseline_notes]
        return TaskResult(
            self.task.name,
            self.task.title or self.task.name,
            self.task.kind,
            self.task.metric,
            metrics,
            {"images": len(self.pictures), "classes": len(self.class_names)},
            chance=self._chance(),
            largest_class=self._largest_class(),
            baseline=baseline,
            synthetic_shift=shift,
            linear_probe=probe,
            notes=[*notes, *probe_notes, *why_not],
            identity=self._identity,
            class_names=self.class_names,
            arrays=arrays,
            picture=self.pictures.__getitem__,
        )

    def _main(self, embedder: Embedder, weights: np.ndarray, pictures: Pictures) -> float:
        return self._measure(embedder, weights, pictures)[0][self.task.metric]

    def _measure(self, embedder: Embedder, weights: np.ndarray, pictures: Pictures) -> tuple[dict, dict, list[str]]:
        """Metrics, arrays of the result, and a note where images are copies of each other."""
        embeddings = finite(embedder.encode_image(pictures))
        equal = copies(embeddings)
        notes = [f"{equal:,} of {len(embeddings):,} images have the same embedding as an earlier one"] if equal else []
        if self._several:
            classified = classify(embeddings, weights, embedder.logit_scale, self.class_names, None)
            return multi_label_metrics(embeddings, weights, self._targets()), classified._asdict(), notes
        labels = self._label_array()
        classified = classify(embeddings, weights, embedder.logit_scale, self.class_names, labels)
        metrics = self._with_mean(single_label_metrics(classified, labels))
        if self.task.metric == "roc_auc":
            metrics |= two_class_metrics(embeddings, weights, labels)
        contradicting = ties(embeddings, labels)
        if contradicting:
            notes.append(f"{contradicting:,} images have the same embedding as an image of another class")
        return metrics, classified._asdict() | {"labels": labels}, notes

    def _label_array(self) -> np.ndarray:
        return np.array(self._classes, np.int32)[:, 0]

    def _targets(self) -> np.ndarray:
        """bool ``[M, C]``, where images have several classes."""
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
            # More than the share of right images, since precision is interpolated: the mean over random rankings.
            targets, random = self._targets(), np.random.default_rng(0)
            draws = [average_precision_11(random.random(targets.shape), targets) for _ in range(RANDOM_RANKINGS)]
            return {"average_precision_11": float(np.mean(draws))}
        top = {f"top_{k}": k / count for k in (1, 5) if k <= count}
        asked = {"roc_auc": 0.5, "mean_top_1_top_5": sum(top.values()) / 2}
        return top | {"mean_per_class": 1 / count} | {k: v for k, v in asked.items() if k == self.task.metric}

    def _largest_class(self) -> dict[str, float]:
        """What the same answer to every image gets: the classes in the order of their size."""
        if self._several:
            targets = self._targets()
            return {"average_precision_11": average_precision_11(np.zeros(targets.shape), targets)}
        labels, count = self._label_array(), len(self.class_names)
        metrics = self._with_mean(rank_metrics(largest_class_ranks(labels, count), labels, count))
        return metrics | ({"roc_auc": 0.5} if self.task.metric == "roc_auc" else {})

    def _nearest_mean_picture(self) -> dict[str, float]:
        labels, count = self._label_array(), len(self.class_names)
        scores = nearest_mean_picture_scores(
            small(self.pictures), small(self._baseline.pictures), self._baseline.labels, count
        )
        metrics = self._with_mean(rank_metrics(label_ranks(scores, labels), labels, count))
        if self.task.metric == "roc_auc" and np.isfinite(scores).all():
            metrics["roc_auc"] = roc_auc(scores[:, 1] - scores[:, 0], labels)
        return metrics

    def _probe_splits(self) -> tuple[list[LabelledImages], list[str]]:
        """Training and validation images of the linear probe, or none and the reason; before anything is embedded."""
        if self._several or not self.task.train:
            why = "images have several classes" if self._several else "the task names no training split"
            return [], [f"no linear probe: {why}"]
        try:
            splits = [self._other_source(key) for key in ("train", "validation") if getattr(self.task, key)]
        except FileNotFoundError as error:
            return [], [f"no linear probe: {error}"]
        return splits, [f"linear probe, {note}" for split in splits for note in split.notes]

    def _probe(self, embedder: Embedder, splits: list[LabelledImages]) -> tuple[dict[str, float], list[str]]:
        train, *validation = [Split(finite(embedder.image_features(split.pictures)), split.labels) for split in splits]
        test = Split(finite(embedder.image_features(self.pictures)), self._label_array())
        try:
            return linear_probe(train, test, len(self.class_names), embedder.mesh, *validation), []
        except ValueError as error:  # too few images, or classes, to fit it
            return {}, [f"no linear probe: {error}"]


def _own_classes(said: Sequence[Said]) -> list[str]:
    """The classes of a source as class names, in order of occurrence."""
    found = list(dict.fromkeys(label for one in said for label in one.labels))
    if found and all(label.isdecimal() for label in found):
        raise ValueError("its classes are numbers; give their class_names, in order")
    if not found:
        raise ValueError(f"none of its {len(said):,} images has a class; name the field that holds it with ?label=")
    return found


def _empty_folders(source: str, class_names: Sequence[str]) -> list[str]:
    """A note where folders of an image_folder have no image, so that they are no classes."""
    kind, _, where = source.partition(":")
    if kind != "image_folder" or JOIN in source:
        return []
    folder = pathlib.Path(split_options(where)[0])
    empty = sorted({entry.name for entry in folder.iterdir() if entry.is_dir()} - set(class_names))
    if not empty:
        return []
    return [f"{len(empty):,} folders have no image that can be read and are no classes, such as {empty[0]!r}"]


def _same_names(class_names: Sequence[str]) -> list[str]:
    twice = sorted({name for name in class_names if class_names.count(name) > 1})
    if len(set(class_names)) == len(class_names):
        return []
    return [
        f"{len(twice)} class names stand for several classes each, such as {twice[0]!r}: the first is the answer, and "
        "images of the others count as wrong"
    ]


def _equal_classes(weights: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """A note where classes of different names have equal text embeddings, since a tie counts as wrong."""
    _, name_of = np.unique(np.asarray(class_names), return_inverse=True)
    equal = ties(weights, name_of)
    if not equal:
        return []
    return [
        f"{equal:,} of {len(weights):,} classes have the same text embedding as a class of another name, so that "
        "images of these classes count as wrong; the tokenizer ignores case and cuts long texts"
    ]


def beside_the_shards(source: str) -> Prompts:
    """The class names and templates that CLIP_benchmark's data sets have beside their tars; none if there are none."""
    if not source.startswith("wds:"):
        return Prompts((), (), ())
    folder = pathlib.Path(source.removeprefix("wds:").partition("?")[0]).parent

    def lines(name: str) -> tuple[str, ...]:
        files = [place / name for place in (folder, folder.parent) if (place / name).is_file()]
        return tuple(files[0].read_text(encoding="utf-8-sig").splitlines()) if files else ()

    templates = tuple(line.replace("{c}", "{}") for line in lines("zeroshot_classification_templates.txt") if line)
    return Prompts(templates, lines("classnames.txt"), ())


def small(pictures: Pictures) -> np.ndarray:
    """All of them at most 32 pixels wide: uint8 ``[M, S, S, 3]``."""
    side = min(BASELINE_SIDE, pictures.like.shape[0])
    result = np.empty((len(pictures), side, side, 3), np.uint8)
    for place, picture in enumerate(pictures):
        result[place] = Image.fromarray(picture).resize((side, side), Image.Resampling.BOX)
    return result
