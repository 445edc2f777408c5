"""What an evaluation found, as data: for ``results.json``, for curves, for the report and for comparisons."""

import dataclasses
import json
from collections.abc import Callable

import numpy as np
from etils import epath

TOP = 5  # classes that are kept for each picture


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One task's result. Every metric is a share in [0, 1].

    Attributes:
      name, title, kind, metric: as the task has them (:mod:`clip_jax.evaluation.registry`); ``metric`` is the one that
        the task is known by, a key of ``metrics``.
      metrics: of zero-shot classification ``top_1``, ``top_5``, ``mean_per_class``, ``calibration_error`` and, where
        the task asks for it, ``mean_top_1_top_5``, ``average_precision_11`` or ``roc_auc``; of retrieval
        ``image_to_text_recall@1`` and so on.
      counts: ``images``, and ``classes`` or ``texts``.
      chance: what guessing gets, by metric.
      baseline: what the nearest mean picture gets, by metric; empty without one.
      synthetic_shift: the main metric under each corruption at strengths 1 to 5; empty where not asked for.
      linear_probe: ``accuracy``, ``C`` and more; empty where not asked for.
      notes: sentences about what was asked for and is not there.
      class_names: of zero-shot classification.
      arrays: by picture, for comparisons and the report. Zero-shot: ``labels`` int32 ``[M]`` (missing where pictures
        have several), ``best`` int32 ``[M, K]`` and ``probabilities`` float32 ``[M, K]`` of the K = min(5, C) best
        classes. Retrieval: ``image_to_text_rank`` int32 ``[I]`` and ``text_to_image_rank`` int32 ``[T]``, how many
        wrong candidates stand before the first right one; for the grid ``shown_texts`` int32 ``[Q]``, ``best_images``
        int32 ``[Q, 5]`` and ``right_images`` bool ``[Q, 5]``.
      texts: of ``shown_texts``, in the same order.
      picture: from an index to uint8 ``[S, S, 3]``, for the report.
    """

    name: str
    title: str
    kind: str
    metric: str
    metrics: dict[str, float]
    counts: dict[str, int]
    chance: dict[str, float] = dataclasses.field(default_factory=dict)
    baseline: dict[str, float] = dataclasses.field(default_factory=dict)
    synthetic_shift: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    linear_probe: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    class_names: list[str] = dataclasses.field(default_factory=list)
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    texts: list[str] = dataclasses.field(default_factory=list)
    picture: Callable[[int], np.ndarray] | None = None

    def as_dict(self) -> dict:
        """All but the arrays and pictures, for JSON; what is empty is left out."""
        kept = ("name", "title", "kind", "metric", "metrics", "counts", "chance", "baseline", "synthetic_shift")
        record = {name: getattr(self, name) for name in (*kept, "linear_probe", "notes")}
        return {name: value for name, value in record.items() if value not in ({}, [], "")}


@dataclasses.dataclass(frozen=True)
class MissingTask:
    """A task that was not scored: ``reason`` says why, ``how_to_get`` the mend where its data is not there."""

    name: str
    title: str
    reason: str
    how_to_get: str


@dataclasses.dataclass(frozen=True)
class Results:
    """Of one model: what was measured and what could not be."""

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
        """Every metric by one name, for curves."""
        return {f"{task.name}/{name}": value for task in self.tasks for name, value in task.metrics.items()}

    def line(self) -> str:
        """Each task's main metric, for the log during training."""
        return "  ".join(f"{task.name} {task.metric} {task.metrics[task.metric]:.1%}" for task in self.tasks)

    def table(self) -> str:
        """Everything, as the lines that a finished run prints."""
        lines = []
        for task in self.tasks:
            counts = ", ".join(f"{count:,} {what}" for what, count in task.counts.items())
            columns = {"": task.metrics, "nearest mean picture": task.baseline, "chance": task.chance}
            columns = {head: column for head, column in columns.items() if column}
            heads = "  ".join(f"{head:>{max(7, len(head))}}" for head in columns)
            lines.append(f"{task.name}, {counts}:".ljust(62) + heads)
            for metric in task.metrics:
                values = [
                    f"{column[metric]:{max(7, len(head))}.2%}" if metric in column else " " * max(7, len(head))
                    for head, column in columns.items()
                ]
                lines.append(f"  {metric:60}{'  '.join(values)}".rstrip())
            for name, values in task.synthetic_shift.items():
                lines.append(
                    f"  {f'{task.metric} under {name}, strengths 1 to 5':60}" + "  ".join(f"{v:7.2%}" for v in values)
                )
            if task.linear_probe:
                probe = ", ".join(f"{name} {value:.4g}" for name, value in task.linear_probe.items())
                lines.append(f"  linear probe: {probe}")
            lines += [f"  {note}" for note in task.notes]
        lines += [f"{task.name} was not scored: {task.reason}" for task in self.missing]
        return "\n".join(lines)


def write_results(folder: epath.Path, results: Results) -> None:
    """``results.json``, and each task's arrays as ``arrays/TASK.npz``."""
    (folder / "arrays").mkdir(parents=True, exist_ok=True)
    for task in results.tasks:
        with (folder / "arrays" / f"{task.name}.npz").open("wb") as stream:
            np.savez_compressed(stream, class_names=np.array(task.class_names), **task.arrays)
    text = json.dumps(results.as_dict(), indent=2, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
