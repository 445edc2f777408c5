"""Writes the report section of a classification task: metrics, plots, confusions, and images with answers."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from clip_jax.evaluation.figures import (
    Html,
    escaped,
    figure_html,
    image_html,
    reliability_figure,
    synthetic_shift_figure,
)
from clip_jax.evaluation.report.page import join, marked, metric_name, notes, percent, table
from clip_jax.evaluation.report.published import published_table
from clip_jax.evaluation.results import PROBE_METRICS, REFERENCES, TaskResult

MISTAKES, WORST_CLASSES, SHOWN_PREDICTIONS = 12, 10, 3
MIN_IMAGES = 5  # of a class whose recall is shown; with fewer, it is too uncertain


def classification_section(task: TaskResult, published: dict, samples: int) -> Html:
    """Returns the section; ``samples`` is the number of images that are drawn at random."""
    rows = {name: (name, value) for name, value in task.metrics.items()}
    names = sorted(rows, key=lambda name: name != task.metric)
    return join(
        f"<p>{task.counts.get('images', 0):,} images, {task.counts.get('classes', 0):,} classes.</p>",
        _reference_table(task, [(metric_name(name), *rows[name]) for name in names]),
        published_table(task, published),
        _linear_probe(task),
        notes(task),
        _plots(task),
        _confusions(task),
        _image_grids(task, samples),
    )


def _reference_table(task: TaskResult, rows: list[tuple[str, str, float]]) -> Html:
    """Returns a table of rows (title, metric, value), with the values of chance and the baselines in that metric."""
    references = {key: name for key, name in reversed(REFERENCES.items()) if getattr(task, key)}
    cells = [
        [
            title,
            marked(value, task.not_above(metric, value)),
            *(percent(getattr(task, key).get(metric)) for key in references),
        ]
        for title, metric, value in rows
    ]
    return table(["metric", "this model, %", *(f"{name}, %" for name in references.values())], cells, stack=True)


def _linear_probe(task: TaskResult) -> Html:
    probe = task.linear_probe
    rows = [(metric_name(name), metric, probe[name]) for name, metric in PROBE_METRICS.items() if name in probe]
    if not rows:
        return Html("")
    strength = f"<p>Regularization strength C = {probe['C']:.4g}, as in scikit-learn.</p>" if "C" in probe else ""
    return join("<h3>Linear probe</h3>", _reference_table(task, rows), strength)


def _plots(task: TaskResult) -> Html:
    figures = []
    labels, best, probabilities = (task.arrays.get(name) for name in ("labels", "best", "probabilities"))
    if labels is not None and best is not None and probabilities is not None:
        error = task.metrics.get("calibration_error")
        figure = reliability_figure(probabilities[:, 0], best[:, 0] == labels)
        caption = "Reliability: bars on the dashed line mean that the stated probabilities can be trusted"
        caption += f"; calibration error {percent(error)} %" if error is not None else ""
        figures.append(figure_html(figure, caption))
    below = ""
    if task.synthetic_shift:
        figure = synthetic_shift_figure(task.metrics.get(task.metric, np.nan), task.synthetic_shift)
        caption = f"Synthetic shift: {metric_name(task.metric)} by strength of each corruption"
        figures.append(figure_html(figure, caption))
        strengths = range(1, 1 + max(map(len, task.synthetic_shift.values())))
        rows = [
            [name.replace("_", " "), *(percent(value) for value in values), *[""] * (len(strengths) - len(values))]
            for name, values in task.synthetic_shift.items()
        ]
        below = table(["corruption, % at strength", *map(str, strengths)], rows)
        below = f"<details><summary>Synthetic shift in numbers</summary>{below}</details>"
    return join(f'<div class="plots">{join(*figures)}</div>' if figures else "", below)


def _class_name(task: TaskResult, index: int) -> str:
    return task.class_names[index] if index < len(task.class_names) else f"class {index}"


def _confusions(task: TaskResult) -> Html:
    """Returns the classes with the lowest recall, among those with enough images."""
    labels, best = task.arrays.get("labels"), task.arrays.get("best")
    if labels is None or best is None or not len(labels):
        return Html("")
    first = best[:, 0]
    images = np.bincount(labels)
    right = np.bincount(labels[first == labels], minlength=len(images))
    counted = np.flatnonzero(images >= MIN_IMAGES)
    if not len(counted):
        return Html("")
    recall = right[counted] / images[counted]
    probabilities = task.arrays.get("probabilities", np.zeros(best.shape))
    certainty = np.bincount(labels, probabilities[:, 0])[counted] / images[counted]
    # Among equal recalls, classes with more images come first, then those with higher probabilities.
    worst = np.lexsort((-certainty, -images[counted], recall))[:WORST_CLASSES]
    rows = []
    for label, share in zip(counted[worst], recall[worst], strict=True):
        answers = Counter(first[(labels == label) & (first != labels)].tolist()).most_common(3)
        taken_for = ", ".join(f"{_class_name(task, answer)} ({count:,})" for answer, count in answers)
        rows.append([_class_name(task, label), taken_for or "–", f"{images[label]:,}", percent(float(share))])
    never = int((recall == 0).sum())
    few = int(np.count_nonzero(images) - len(counted))
    sentences = [
        f"{never:,} of {len(counted):,} classes are never recognized." if never else "",
        f"{few:,} classes with fewer than {MIN_IMAGES} images are not listed." if few else "",
    ]
    return join(
        "<h3>Classes with the lowest recall</h3>",
        f"<p>{escaped(' '.join(filter(None, sentences)))}</p>" if any(sentences) else "",
        table(["class", "wrong answers (times)", "images", "recognized, %"], rows, texts=2, stack=True),
    )


def _image_grids(task: TaskResult, samples: int) -> Html:
    best, labels = task.arrays.get("best"), task.arrays.get("labels")
    if task.image_at is None or best is None or not len(best):
        return Html("")
    pieces = []
    if labels is not None and "probabilities" in task.arrays:
        wrong = np.flatnonzero(best[:, 0] != labels)
        surest = wrong[np.argsort(-task.arrays["probabilities"][wrong, 0], kind="stable")][:MISTAKES]
        if len(surest):
            heading = (
                "<h3>Mistakes with the highest probability</h3><p>On the left the image and its class, on the right "
                "the model's answer and an image of that class from the same data.</p>"
            )
            pieces.append(join(heading, _grid((_prediction(task, int(index), 1) for index in surest), "wide")))
    chosen = np.sort(np.random.default_rng(0).choice(len(best), min(samples, len(best)), replace=False))
    right = (
        ""
        if labels is None
        else " The right class is in bold, and ✓ marks it where the model names it. On the right of an image with a "
        "wrong first answer is an image of that answer."
    )
    heading = f"<h3>Images drawn at random</h3><p>With the model's first {SHOWN_PREDICTIONS} answers.{right}</p>"
    pieces.append(join(heading, _grid(_prediction(task, int(index), SHOWN_PREDICTIONS) for index in chosen)))
    return join(*pieces)


def _grid(figures: Iterable[str], kind: str = "") -> Html:
    return Html(f'<div class="images {kind}">{join(*figures)}</div>')


def _prediction(task: TaskResult, index: int, count: int) -> Html:
    """Returns an image with its class and the model's first answers, next to an example of a wrong first answer."""
    labels, best, probabilities = (task.arrays.get(name) for name in ("labels", "best", "probabilities"))
    label = None if labels is None else int(labels[index])
    name = f"image {index}" if label is None else _class_name(task, label)
    answers = []
    for rank, answer in enumerate(best[index, :count].tolist()):
        probability = "" if probabilities is None else f"{percent(float(probabilities[index, rank]))} %"
        kind, mark = ("right", "✓ ") if answer == label else ("wrong", "")
        text = f"{mark}{_class_name(task, answer)}"
        answers.append(f'<li class="{kind}">{escaped(text)} <span class="quiet">{probability}</span></li>')
    title = "" if label is None else f"<b>{escaped(name)}</b>"
    numbered = ' class="single"' if count == 1 else ""
    image = image_html(task.image_at(index), name)
    if label is not None:  # a pair without an example too, so that all images have the same size
        example = _example(task, int(best[index, 0])) if best[index, 0] != label else ""
        image = f'<div class="pair">{image}{example}</div>'
    # With a single answer, each name is below its image.
    side_by_side = ' class="pair"' if count == 1 else ""
    return Html(
        f"<figure>{image}<figcaption{side_by_side}>{title}<ol{numbered}>{''.join(answers)}</ol></figcaption></figure>"
    )


def _example(task: TaskResult, answer: int) -> Html:
    """Returns the first image of a class in the task's data, or a sentence that says why there is no image."""
    images = np.flatnonzero(task.arrays["labels"] == answer)
    name = _class_name(task, answer)
    if not len(images):
        return Html(f"<p>The data has no image of “{escaped(name)}”.</p>")
    return image_html(task.image_at(int(images[0])), f"the answer: {name}")
