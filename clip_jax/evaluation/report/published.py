"""Compares a model with published numbers: a table for each task, and plots under natural distribution shifts."""

import json
from collections.abc import Sequence
from importlib import resources

import numpy as np

from clip_jax.evaluation.figures import Html, escaped, figure_html, shift_figure
from clip_jax.evaluation.registry import TASKS
from clip_jax.evaluation.report.page import join, metric_name, percent, table
from clip_jax.evaluation.results import TaskResult
from clip_jax.evaluation.robustness import MIN_SHARE, effective_robustness, fit_standard_line


def load_published() -> dict:
    """Returns other models' numbers from ``published.json``; empty if the file does not exist."""
    file = resources.files("clip_jax.evaluation") / "published.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _published_row(published: dict, task: str, tables: Sequence[str]) -> tuple[str, list[str], list[float | None]]:
    """Returns the source, the models, and their shares in [0, 1] or None; empty if no table has the task."""
    row = next((entry.published for entry in TASKS if entry.name == task), "") or task
    for name in tables:
        values = published.get(name, {}).get("tasks", {}).get(row)
        if any(value is not None for value in values or ()):
            shares = [None if value is None else value / 100 for value in values]
            return published[name].get("source", ""), published[name]["models"], shares
    return "", [], []


def shifts_of(tasks: list[TaskResult], published: dict) -> list[TaskResult]:
    """Returns the natural shifts of ImageNet among the tasks; empty without ImageNet itself."""
    if not any(task.name == "imagenet" for task in tasks):
        return []
    tables = ("shift", "standard_models")
    known = {row for name in tables for row in published.get(name, {}).get("tasks", {})} - {"imagenet"}
    rows = {entry.name: entry.published for entry in TASKS if entry.published}
    return [task for task in tasks if rows.get(task.name, task.name) in known]


def natural_shift_section(tasks: list[TaskResult], published: dict) -> Html:
    """Returns accuracies, effective robustness and plots of the natural shifts; empty without shifts."""
    shifts = shifts_of(tasks, published)
    if not shifts:
        return Html("")
    imagenet = next(task.metrics[task.metric] for task in tasks if task.name == "imagenet")
    groups = {
        "trained on ImageNet": ("standard_models",),
        "OpenAI's CLIPs, zero-shot": ("shift", "zero_shot", "shift_paper"),
    }
    average = f"average of {len(shifts)}"
    sets = [(average, shifts)] if len(shifts) > 1 else []
    sets += [((task.title or task.name), [task]) for task in shifts]
    figures, rows = [], []
    for title, chosen in sets:
        here = float(np.mean([task.metrics[task.metric] for task in chosen]))
        points = {
            name: _points([_published_row(published, task, tables) for task in _names(chosen)])
            for name, tables in groups.items()
        }
        standard = points["trained on ImageNet"]
        # The logit of an accuracy near 0 has no meaning, such as ResNet-50's on the set of its mistakes.
        fitted = [(x, y) for x, y in zip(*standard, strict=True) if min(y, 1 - y) > MIN_SHARE]
        line = fit_standard_line(*zip(*fitted, strict=True)) if len({x for x, _ in fitted}) > 1 else None
        gain = effective_robustness(imagenet, here, line) if line else None
        figure = shift_figure(points, (imagenet, here), line, xlabel="ImageNet, %", ylabel="shift, %")
        alt = f"{title}: {percent(here)} % against {percent(imagenet)} % on ImageNet"
        figures.append(figure_html(figure, alt))
        rows.append([title, percent(here), percent(gain, sign=True)])
    rows_used = [_published_row(published, name, tables) for name in _names(shifts) for tables in groups.values()]
    sources = {source for source, _, _ in rows_used} - {""}
    source = f"Other models' numbers: {'; '.join(sorted(sources))}." if sources else ""
    return join(
        "<h2>Natural distribution shift</h2>",
        "<p>The same classes as ImageNet's in images of another kind. The axes are in logits, where models trained on "
        "ImageNet are on a line; a model above the line is more robust than its ImageNet accuracy predicts.</p>",
        table(["shift", "accuracy, %", "effective robustness, points"], rows),
        f'<div class="plots">{join(*figures)}</div>',
        f'<p class="quiet">{escaped(source)}</p>' if source else "",
    )


def _names(shifts: list[TaskResult]) -> list[str]:
    return ["imagenet", *(task.name for task in shifts)]


def _points(rows: list[tuple[str, list[str], list[float | None]]]) -> tuple[list[float], list[float]]:
    """Returns accuracies on ImageNet (the first row) and the mean of the others, of the models that all rows have."""
    by_model = [
        {model: share for model, share in zip(row[1], row[2], strict=False) if share is not None} for row in rows
    ]
    models = [model for model in by_model[0] if all(model in row for row in by_model[1:])]
    averages = [float(np.mean([row[model] for row in by_model[1:]])) for model in models]
    return [by_model[0][model] for model in models], averages


def published_table(task: TaskResult, published: dict) -> Html:
    """Returns a table of this model next to OpenAI's published models; empty without published numbers."""
    main = task.metrics.get(task.metric)
    # Table 10 has the main metric of the data set. A probe has only these two.
    probe = task.linear_probe.get({"top_1": "accuracy", "mean_per_class": "mean_per_class"}.get(task.metric, ""))
    wanted = [
        ("zero-shot, measured", main, ("zero_shot", "shift")),
        ("zero-shot, in the paper", main, ("zero_shot_paper", "shift_paper")),
        ("linear probe, in the paper", probe, ("linear_probe",)),
    ]
    if task.kind == "retrieval":
        wanted = [(metric_name(metric), value, (metric,)) for metric, value in task.metrics.items()]
    found = [(label, own, *_published_row(published, task.name, tables)) for label, own, tables in wanted]
    found = [row for row in found if row[3]]
    if not found:
        return Html("")
    models = list(dict.fromkeys(model for row in found for model in row[3]))
    rows = []
    for label, own, _, names, shares in found:
        by_model = dict(zip(names, shares, strict=True))
        rows.append([label, percent(own), *(percent(by_model.get(model)) for model in models)])
    sources = dict.fromkeys(f"{label}: {source}" for label, _, source, _, _ in found)
    return join(
        "<h3>Compared with the models that OpenAI published</h3>",
        table(["%", "this model", *models], rows),
        *(f'<p class="quiet">{escaped(source)}</p>' for source in sources),
    )
