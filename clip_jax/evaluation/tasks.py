"""Tasks with their data: opened once, scored as often as wanted, by the training loop and by ``clip_jax.evaluate``."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from clip_jax.evaluation import retrieval
from clip_jax.evaluation.corruptions import CORRUPTIONS, STRENGTHS, corruption
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.linear_probe import Split, linear_probe
from clip_jax.evaluation.pictures import Pictures, Said, open_on_all_hosts, read_said
from clip_jax.evaluation.registry import Task
from clip_jax.evaluation.remembered import Classifier
from clip_jax.evaluation.results import MissingTask, Results, TaskResult
from clip_jax.evaluation.zero_shot import (
    Prompts,
    classify,
    load_prompts,
    multi_label_metrics,
    nearest_mean_picture_scores,
    single_label_metrics,
    top_k_accuracy,
    two_class_metrics,
)

SHOWN_TEXTS = 8  # in the grid of the report
BASELINE_SIDE = 32  # px; the mean of many pictures has no finer detail


@dataclasses.dataclass(frozen=True)
class Extras:
    """What is measured beside a task's own metrics, where the task has it."""

    baseline: bool = False
    synthetic_shift: bool = False
    linear_probe: bool = False


class ClassificationTask:
    """A labelled set and its prompts.

    Raises:
      FileNotFoundError: the data or what reads it is not there.
      ValueError: a picture has no class or an unknown one, or class names, labels and metric do not go together.
    """

    def __init__(self, task: Task, image_size: int, data: str):
        self.task, self._image_size, self._data = task, image_size, data
        self._several = task.metric == "average_precision_11"
        prompts = load_prompts(task.prompts) if task.prompts else beside_the_shards(task.source.replace("{data}", data))
        self._templates = task.templates or prompts.templates or ("{}",)
        wrong = [template for template in self._templates if template.count("{}") != 1]
        if wrong:
            raise ValueError(f"the template {wrong[0]!r} must have one {{}}, the place of the name")
        names = task.class_names or prompts.class_names
        labels = task.labels or (() if task.class_names else prompts.labels)
        said, pictures = self._open(task.source)
        self._class_of = class_numbers(said, names, labels, folders=task.source.startswith("image_folder:"))
        self.class_names = list(names) or list(self._class_of)
        count = len(self.class_names)
        if (task.metric in ("top_5", "mean_top_1_top_5") and count < 5) or (task.metric == "roc_auc" and count != 2):
            raise ValueError(f"{task.metric} is no metric of {count} classes")
        self.pictures, self._classes = self._known(said, pictures)
        self._baseline = self._known(*self._open(task.pixel_baseline)) if task.pixel_baseline else None

    def _open(self, source: str) -> tuple[list[Said], Pictures]:
        source = source.replace("{data}", self._data)
        opened = open_on_all_hosts(source)
        return read_said(source, opened), Pictures(source, opened, self._image_size)

    def _known(self, said: list[Said], pictures: Pictures) -> tuple[Pictures, list[list[int]]]:
        """The pictures that count, and their classes."""
        rows, classes = [], []
        for row, one in enumerate(said):
            unknown = [label for label in one.labels if label not in self._class_of]
            if unknown and not self.task.other_classes:
                raise ValueError(f"{unknown[0]!r} is none of its {len(self.class_names)} classes")
            if len(one.labels) != 1 and not self._several:
                raise ValueError(f"record {row} has {len(one.labels) or 'no'} classes; it must have one")
            if not unknown:
                rows.append(row)
                classes.append([self._class_of[label] for label in one.labels])
        if not rows:
            raise ValueError(f"no picture is of one of its {len(self.class_names)} classes")
        return pictures.chosen(rows), classes

    def score(self, embedder: Embedder, classifier: Classifier, extras: Extras) -> TaskResult:
        weights = classifier(self.class_names, self._templates)
        metrics, arrays = self._measure(embedder, weights, self.pictures)
        shift = {}
        if extras.synthetic_shift:
            shift = under_corruptions(self.pictures, lambda pictures: self._main(embedder, weights, pictures))
        probe, notes = self._probe(embedder) if extras.linear_probe else ({}, [])
        return TaskResult(
            self.task.name,
            self.task.title or self.task.name,
            self.task.kind,
            self.task.metric,
            metrics,
            {"images": len(self.pictures), "classes": len(self.class_names)},
            chance=self._chance(),
            baseline=self._nearest_mean_picture() if extras.baseline and self._baseline else {},
            synthetic_shift=shift,
            linear_probe=probe,
            notes=notes,
            class_names=self.class_names,
            arrays=arrays,
            picture=self.pictures.__getitem__,
        )

    def _main(self, embedder: Embedder, weights: np.ndarray, pictures: Pictures) -> float:
        return self._measure(embedder, weights, pictures)[0][self.task.metric]

    def _measure(self, embedder: Embedder, weights: np.ndarray, pictures: Pictures) -> tuple[dict, dict]:
        embeddings = finite(embedder.encode_image(pictures))
        if self._several:
            targets = np.zeros((len(pictures), len(weights)), bool)
            for row, classes in enumerate(self._classes):
                targets[row, classes] = True
            classified = classify(embeddings, weights, embedder.logit_scale, self.class_names, None)
            return multi_label_metrics(embeddings, weights, targets), classified._asdict()
        labels = self._labels(self._classes)
        classified = classify(embeddings, weights, embedder.logit_scale, self.class_names, labels)
        metrics = single_label_metrics(classified, labels)
        if self.task.metric == "mean_top_1_top_5":
            metrics["mean_top_1_top_5"] = (metrics["top_1"] + metrics["top_5"]) / 2
        if self.task.metric == "roc_auc":
            metrics |= two_class_metrics(embeddings, weights, labels)
        return metrics, classified._asdict() | {"labels": labels}

    @staticmethod
    def _labels(classes: list[list[int]]) -> np.ndarray:
        return np.array(classes, np.int32)[:, 0]

    def _chance(self) -> dict[str, float]:
        count = len(self.class_names)
        if self._several:
            return {"average_precision_11": sum(map(len, self._classes)) / (len(self._classes) * count)}
        top = {f"top_{k}": k / count for k in (1, 5) if k <= count}
        asked = {"roc_auc": 0.5, "mean_top_1_top_5": sum(top.values()) / 2}
        return top | {"mean_per_class": 1 / count} | {k: v for k, v in asked.items() if k == self.task.metric}

    def _nearest_mean_picture(self) -> dict[str, float]:
        pictures, classes = self._baseline
        scores = nearest_mean_picture_scores(
            small(self.pictures), small(pictures), self._labels(classes), len(self.class_names)
        )
        labels = self._labels(self._classes)
        return {f"top_{k}": top_k_accuracy(scores, labels, k) for k in (1, 5)}

    def _probe(self, embedder: Embedder) -> tuple[dict[str, float], list[str]]:
        """What a linear probe gets, or why there is none."""
        if self._several or not self.task.train:
            why = "pictures have several classes" if self._several else "the task names no training split"
            return {}, [f"no linear probe: {why}"]
        try:
            names = filter(None, (self.task.train, self.task.validation))
            splits = [self._known(*self._open(source)) for source in names]
        except FileNotFoundError as error:
            return {}, [f"no linear probe: {error}"]
        features = [
            Split(finite(embedder.image_features(pictures)), self._labels(classes))
            for pictures, classes in [*splits, (self.pictures, self._classes)]
        ]
        train, *validation, test = features
        return linear_probe(train, test, len(self.class_names), embedder.mesh, *validation), []


class RetrievalTask:
    """Pictures and their captions.

    Raises:
      FileNotFoundError, ValueError: as :class:`ClassificationTask`.
    """

    def __init__(self, task: Task, image_size: int, data: str):
        source = task.source.replace("{data}", data)
        opened = open_on_all_hosts(source)
        captions = [said.captions for said in read_said(source, opened)]
        self.task, self.pictures = task, Pictures(source, opened, image_size)
        if task.first_caption:
            self._texts = list(dict.fromkeys(texts[0] for texts in captions))
            place = {text: number for number, text in enumerate(self._texts)}
            self._image_ids = np.array([place[texts[0]] for texts in captions])
            self._text_ids = np.arange(len(self._texts))
        else:
            self._texts = [text for texts in captions for text in texts]
            self._image_ids = np.arange(len(captions))
            self._text_ids = np.repeat(self._image_ids, [len(texts) for texts in captions])

    def score(self, embedder: Embedder, classifier: Classifier, extras: Extras) -> TaskResult:
        text_embeddings = finite(embedder.encode_text(self._texts))
        metrics, arrays = self._measure(embedder, text_embeddings, self.pictures)
        shift = {}
        if extras.synthetic_shift:
            shift = under_corruptions(self.pictures, lambda pictures: self._main(embedder, text_embeddings, pictures))
        return TaskResult(
            self.task.name,
            self.task.title or self.task.name,
            self.task.kind,
            self.task.metric,
            metrics,
            {"images": len(self.pictures), "texts": len(self._texts)},
            chance=retrieval.chance(self._image_ids, self._text_ids),
            synthetic_shift=shift,
            arrays=arrays,
            texts=[self._texts[text] for text in arrays["shown_texts"]],
            picture=self.pictures.__getitem__,
        )

    def _main(self, embedder: Embedder, text_embeddings: np.ndarray, pictures: Pictures) -> float:
        return self._measure(embedder, text_embeddings, pictures)[0][self.task.metric]

    def _measure(self, embedder: Embedder, text_embeddings: np.ndarray, pictures: Pictures) -> tuple[dict, dict]:
        image_embeddings = finite(embedder.encode_image(pictures))
        ranks = {
            "image_to_text_rank": retrieval.retrieval_ranks(
                image_embeddings, text_embeddings, self._image_ids, self._text_ids
            ),
            "text_to_image_rank": retrieval.retrieval_ranks(
                text_embeddings, image_embeddings, self._text_ids, self._image_ids
            ),
        }
        count = min(SHOWN_TEXTS, len(self._texts))
        shown = np.sort(np.random.default_rng(0).choice(len(self._texts), count, replace=False)).astype(np.int32)
        best = retrieval.nearest(text_embeddings[shown], image_embeddings, 5)  # [Q, 5]
        right = self._image_ids[best] == self._text_ids[shown][:, None]
        return retrieval.recalls(*ranks.values()), ranks | {
            "shown_texts": shown,
            "best_images": best,
            "right_images": right,
        }


class Evaluations:
    """Tasks whose data is opened; those whose data is not there are ``missing``, those of wrong data ``broken``.

    Args:
      tasks: of :func:`clip_jax.evaluation.registry.find_tasks`.
      image_size: S, of the model.
      data: the folder that ``{data}`` stands for.
    """

    def __init__(self, tasks: Sequence[Task], image_size: int, data: str):
        kinds = {"zero_shot": ClassificationTask, "retrieval": RetrievalTask}
        self.tasks: list[ClassificationTask | RetrievalTask] = []
        self.missing: list[MissingTask] = []
        self.broken: list[MissingTask] = []
        for task in tasks:
            try:
                self.tasks.append(kinds[task.kind](task, image_size, os.path.expanduser(data)))
            except FileNotFoundError as error:
                self.missing.append(_not_scored(task, error, task.how_to_get.replace("{data}", data)))
            except ValueError as error:
                self.broken.append(_not_scored(task, error))

    def __bool__(self) -> bool:
        return bool(self.tasks)

    def score(
        self,
        embedder: Embedder,
        classifier: Classifier,
        model: str,
        architecture: str,
        extras: Extras = Extras(),
        tell: Callable[[Results], None] = lambda results: None,
        again: bool = True,
    ) -> Results:
        """Scores the embedder's model on every task.

        A task that fails, since a picture cannot be decoded or embeddings are not finite, is one that was not scored,
        with the reason; the others go on.

        Args:
          classifier: of the class names and templates of a task.
          tell: hears of the results so far after each task.
          again: whether pictures are kept for the next time.
        """
        results = Results(model, architecture, [], [*self.missing, *self.broken])
        for task in self.tasks:
            try:
                results.tasks.append(task.score(embedder, classifier, extras))
            except (ValueError, FloatingPointError) as error:
                results.missing.append(_not_scored(task.task, error))
            if not again:
                task.pictures.forget()
            tell(results)
        return results


def _not_scored(task: Task, error: Exception, how_to_get: str = "") -> MissingTask:
    return MissingTask(task.name, task.title or task.name, " ".join(str(error).split()), how_to_get)


def beside_the_shards(source: str) -> Prompts:
    """The class names and templates that CLIP_benchmark's data sets have beside their tars; none if there are none."""
    if not source.startswith("wds:"):
        return Prompts((), (), ())
    folder = pathlib.Path(source.removeprefix("wds:").partition("?")[0]).parent

    def lines(name: str) -> tuple[str, ...]:
        files = [place / name for place in (folder, folder.parent) if (place / name).is_file()]
        return tuple(files[0].read_text(encoding="utf-8").splitlines()) if files else ()

    templates = tuple(line.replace("{c}", "{}") for line in lines("zeroshot_classification_templates.txt") if line)
    return Prompts(templates, lines("classnames.txt"), ())


def class_numbers(
    said: Sequence[Said], class_names: Sequence[str], labels: Sequence[str], folders: bool = False
) -> dict[str, int]:
    """From what a source calls a class to its number among the ``class_names``.

    ``labels`` are the source's own names, in the same order. Without them its classes are class names themselves, or
    their numbers, or with ``folders`` in the alphabetical order of those; without class names they are those that
    occur, in order of occurrence.

    Raises:
      ValueError: class names and the source's classes do not go together; one line.
    """
    found = dict.fromkeys(label for one in said for label in one.labels)
    numbers = bool(found) and all(label.isdecimal() for label in found)
    if labels:
        if len(labels) != len(class_names):
            raise ValueError(f"{len(class_names)} class names for {len(labels)} labels")
        return {label: number for number, label in enumerate(labels)}
    if not class_names:
        if numbers:
            raise ValueError("its classes are numbers; give their class_names, in order")
        return {label: number for number, label in enumerate(found)}
    if found.keys() <= set(class_names):
        twice = [name for name in found if class_names.count(name) > 1]
        if twice:
            raise ValueError(f"the class name {twice[0]!r} is there twice; give labels beside the class_names")
        return {label: number for number, label in enumerate(class_names)}
    if numbers:
        most = max(map(int, found))
        if most >= len(class_names):
            raise ValueError(
                f"its labels go up to {most}, which needs {most + 1} class names, but there are {len(class_names)}"
            )
        return {label: int(label) for label in found}
    if folders:
        if len(found) != len(class_names):
            raise ValueError(f"{len(class_names)} class names for {len(found)} folders")
        return {label: number for number, label in enumerate(sorted(found))}
    unknown = next(label for label in found if label not in class_names)
    raise ValueError(f"{unknown!r} is none of its {len(class_names)} class names")


def under_corruptions(pictures: Pictures, measure: Callable[[Pictures], float]) -> dict[str, list[float]]:
    """What is measured on the pictures under each corruption, at strengths 1 to 5."""
    return {
        name: [measure(pictures.changed(corruption(name, strength))) for strength in STRENGTHS] for name in CORRUPTIONS
    }


def small(pictures: Pictures) -> np.ndarray:
    """All of them at most 32 pixels wide: uint8 ``[M, S, S, 3]``."""
    side = min(BASELINE_SIDE, pictures.like.shape[0])
    result = np.empty((len(pictures), side, side, 3), np.uint8)
    for place, picture in enumerate(pictures):
        result[place] = Image.fromarray(picture).resize((side, side), Image.Resampling.BOX)
    return result


def finite(embeddings: np.ndarray) -> np.ndarray:
    """The same embeddings; raises FloatingPointError if one is not finite."""
    wrong = np.count_nonzero(~np.isfinite(embeddings).all(axis=1))
    if wrong:
        raise FloatingPointError(
            f"{wrong:,} of {len(embeddings):,} embeddings are not finite; the weights are damaged, or too large for "
            "the dtype"
        )
    return embeddings
