"""The results of an evaluation as data classes: printed, written to ``results.json``, and read by the report."""

import dataclasses
import json
from collections.abc import Callable, Mapping

import numpy as np
from etils import epath

TOP = 5  # classes that are kept for each image
# Attributes of TaskResult that a metric is compared with, and the names that are printed.
REFERENCES = {"baseline": "nearest mean image", "largest_class": "largest class", "chance": "chance"}
PROBE_METRICS = {"accuracy": "top_1", "mean_per_class": "mean_per_class"}  # of a linear probe: of zero-shot


def not_above(levels: Mapping[str, Mapping[str, float]], metric: str, value: float | None) -> list[str]:
    """Returns the names of the references that ``value`` does not exceed; ``levels`` has a dict for each reference."""
    found = {name: levels.get(key, {}).get(metric) for key, name in REFERENCES.items()}
    return [name for name, level in found.items() if None not in (value, level) and value <= level + 1e-9]


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One task's result. Every metric is a share in [0, 1].

    Attributes:
      name, title, kind, metric: those of the :class:`clip_jax.evaluation.task.Task`. ``metric`` is the main metric, a
        key of ``metrics``.
      metrics: for zero-shot classification ``top_1``, ``top_5``, ``mean_per_class``, ``calibration_error`` and, if it
        is the main metric, ``mean_top_1_top_5``, ``average_precision_11`` or ``roc_auc``. For retrieval
        ``image_to_text_recall@1`` and so on.
      counts: ``images``, and ``classes`` or ``texts``.
      chance: the expected value of guessing, by metric.
      largest_class: the value of answering every image with the largest class, by metric; empty for retrieval.
      baseline: the value of the nearest mean image, by metric; empty without this baseline.
      synthetic_shift: the main metric under each corruption at strengths 1 to 5; empty if not measured.
      linear_probe: ``accuracy``, ``C`` and more; empty if not measured.
      notes: sentences about records that were left out, labels that were matched loosely, and missing measurements.
      identity: digests of the images, classes and templates, or of images and texts. Results of the same task have the
        same digests.
      class_names: for zero-shot classification.
      arrays: answers for comparisons and the report. Zero-shot: ``labels`` int32 ``[M]`` (missing if images have
        several), ``best`` int32 ``[M, K]`` and ``probabilities`` float32 ``[M, K]`` of the K = min(5, C) best classes.
        Retrieval: ``image_to_text_rank`` int32 ``[I]`` and ``text_to_image_rank`` int32 ``[T]``, how many wrong
        candidates rank before the first match; for the report ``shown_texts`` int32 ``[Q]``, ``best_images`` int32
        ``[Q, 5]`` and ``right_images`` bool ``[Q, 5]``.
      texts: the texts of ``shown_texts``, in the same order.
      image_at: from an index to the image uint8 ``[S, S, 3]``, for the report.
    """

    name: str
    title: str
    kind: str
    metric: str
    metrics: dict[str, float]
    counts: dict[str, int]
    chance: dict[str, float] = dataclasses.field(default_factory=dict)
    largest_class: dict[str, float] = dataclasses.field(default_factory=dict)
    baseline: dict[str, float] = dataclasses.field(default_factory=dict)
    synthetic_shift: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    linear_probe: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    identity: dict[str, str] = dataclasses.field(default_factory=dict)
    class_names: list[str] = dataclasses.field(default_factory=list)
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    texts: list[str] = dataclasses.field(default_factory=list)
    image_at: Callable[[int], np.ndarray] | None = None

    def not_above(self, metric: str, value: float | None = None) -> list[str]:
        """Returns the names of the references, such as chance, that a metric does not exceed.

        Args:
          metric: a key of ``metrics``.
          value: replaces ``metrics[metric]``, for a linear probe.
        """
        value = self.metrics.get(metric) if value is None else value
        return not_above({key: getattr(self, key) for key in REFERENCES}, metric, value)

    def as_dict(self) -> dict:
        """Returns all but arrays and images, for JSON. Empty values are left out."""
        kept = ("name", "title", "kind", "metric", "metrics", "counts", "chance", "largest_class", "baseline")
        record = {name: getattr(self, name) for name in (*kept, "synthetic_shift", "linear_probe", "notes", "identity")}
        record["not_above"] = self.not_above(self.metric)
        return {name: value for name, value in record.items() if value not in ({}, [], "")}


@dataclasses.dataclass(frozen=True)
class MissingTask:
    """A task that was not scored: the reason, and how to get its data if it is missing."""

    name: str
    title: str
    reason: str
    how_to_get: str


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of one model: the tasks that were scored, and those that were not."""

    model: str
    architecture: str
    tasks: list[TaskResult]
    missing: list[MissingTask] = dataclasses.field(default_factory=list)

    def as_dict(self) -> dict:
        return {
            "model": self.model,
            "architecture": self.architecture,
            "tasks": {task.name: task.as_dict() for task in self.tasks},
            "missing": {task.name: dataclasses.asdict(task) for task in self.missing},
        }

    def scalars(self) -> dict[str, float]:
        """Returns every metric, by ``task/metric``."""
        return {f"{task.name}/{name}": value for task in self.tasks for name, value in task.metrics.items()}

    def line(self) -> str:
        """Each task's main metric, for the log during training."""
        return "  ".join(main_metric(task) for task in self.tasks)

    def table(self) -> str:
        """Returns all results as lines of text."""
        lines = [line for task in self.tasks for line in _task_lines(task)]
        lines += [f"{task.name} was not scored: {task.reason}" for task in self.missing]
        return "\n".join(lines)


def main_metric(task: TaskResult) -> str:
    """Returns a text such as ``digits top_1 7.1% (not above largest class, chance)``."""
    return f"{task.name} {task.metric} {task.metrics[task.metric]:.1%}{mark(task.not_above(task.metric))}"


def mark(not_above: list[str]) -> str:
    """Returns a text such as `` (not above chance)``; empty for no names."""
    return f" (not above {', '.join(not_above)})" if not_above else ""


def _task_lines(task: TaskResult) -> list[str]:
    counts = ", ".join(f"{count:,} {what}" for what, count in task.counts.items())
    columns = {"": task.metrics} | {name: getattr(task, key) for key, name in REFERENCES.items()}
    columns = {head: column for head, column in columns.items() if column}
    heads = "  ".join(f"{head:>{max(7, len(head))}}" for head in columns)

    def row(name: str, metric: str, value: float) -> str:
        cells = [column.get(metric) if head else value for head, column in columns.items()]
        widths = [max(7, len(head)) for head in columns]
        values = [
            " " * width if cell is None else f"{cell:{width}.2%}" for cell, width in zip(cells, widths, strict=True)
        ]
        return f"  {name:60}{'  '.join(values)}{mark(task.not_above(metric, value))}".rstrip()

    lines = [f"{task.name}, {counts}:".ljust(62) + heads]
    lines += [row(metric, metric, value) for metric, value in task.metrics.items()]
    for name, metric in PROBE_METRICS.items():
        if name in task.linear_probe:
            lines.append(row(f"linear probe, {name}", metric, task.linear_probe[name]))
    if "C" in task.linear_probe:
        lines.append(f"  linear probe, C: {task.linear_probe['C']:.4g}")
    for name, values in task.synthetic_shift.items():
        label = f"{task.metric} under {name}, strengths 1 to 5"
        lines.append(f"  {label:60}" + "  ".join(f"{value:7.2%}" for value in values))
    return lines + [f"  note: {note}" for note in task.notes]


def write_results(folder: epath.Path, results: Results) -> None:
    """Writes ``results.json``, and each task's arrays to ``arrays/TASK.npz``."""
    (folder / "arrays").mkdir(parents=True, exist_ok=True)
    for task in results.tasks:
        with (folder / "arrays" / f"{task.name}.npz").open("wb") as stream:
            np.savez_compressed(stream, class_names=np.array(task.class_names), **task.arrays)
    text = json.dumps(results.as_dict(), indent=2, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
