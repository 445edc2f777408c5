"""Writes the report section on training: curves of the loss and of each task's metrics."""

from collections.abc import Sequence

from clip_jax.evaluation.figures import Html, curves_figure, figure_html
from clip_jax.evaluation.report.page import DIRECTIONS, join, metric_name
from clip_jax.evaluation.report.summary import task_title
from clip_jax.evaluation.results import REFERENCES, TaskResult


def training_section(history: Sequence[dict[str, float]], tasks: list[TaskResult]) -> Html:
    """Returns plots of the loss, the accuracy within the batch and each task's metrics; empty without a history."""
    figures = []
    losses = _curve(history, "loss")
    if losses:
        alt = f"Training loss over the steps, last {losses[1][-1]:.3f}"
        figures.append(figure_html(curves_figure({"loss": losses}, ylabel="loss"), alt, "Training loss"))
    accuracies = {name: _curve(history, f"{key}_accuracy", 100) for key, name in DIRECTIONS.items()}
    accuracies = {name: curve for name, curve in accuracies.items() if curve}
    if accuracies:
        caption = "Accuracy within the batch: how often the closest text of the batch is the image's own"
        figures.append(figure_html(curves_figure(accuracies, ylabel="accuracy, %"), caption))
    names = dict.fromkeys(key.rpartition("/")[0] for record in history for key in record if "/" in key)
    results = {task.name: task for task in tasks}
    figures += [_task_history(history, name, results.get(name)) for name in names]
    return Html(f'<h2>Training</h2><div class="plots">{join(*figures)}</div>' if any(figures) else "")


def _curve(history: Sequence[dict], key: str, factor: float = 1) -> tuple[list[float], list[float]] | None:
    records = [record for record in history if record.get(key) is not None]
    return ([record["step"] for record in records], [factor * record[key] for record in records]) if records else None


def _task_history(history: Sequence[dict[str, float]], name: str, task: TaskResult | None) -> Html:
    metrics = ["top_1", "top_5", "image_to_text_recall@1", "text_to_image_recall@1"]
    if task and task.metric not in metrics:
        metrics = [task.metric]
    curves = {metric: _curve(history, f"{name}/{metric}", 100) for metric in metrics}
    curves = {metric_name(metric): curve for metric, curve in curves.items() if curve}
    if not curves:
        return Html("")
    levels = {metric_name(metric): _highest_reference(task, metric) for metric in metrics} if task else {}
    levels = {name: level for name, level in levels.items() if level}
    title = task_title(task) if task else name
    figure = curves_figure(curves, levels, ylabel="%", ylim=(0, None))
    return figure_html(figure, f"{title}: {' and '.join(curves)} over the steps of training", title)


def _highest_reference(task: TaskResult, metric: str) -> tuple[str, float] | None:
    """Returns the name and value in per cent of the highest reference; None without references."""
    known = [
        (name, 100 * getattr(task, key)[metric]) for key, name in REFERENCES.items() if metric in getattr(task, key)
    ]
    return max(known, key=lambda entry: entry[1], default=None)
