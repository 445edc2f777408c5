"""Compares the evaluations of several models, with intervals and paired differences.

Models that answered the same questions tend to fail on the same ones, so the interval of their difference is much
narrower than their own intervals. If results of a task differ in more than the model, such as in the number of images,
a note states it.
"""

import json
import math
import zipfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from clip_jax.evaluation.figures import BLUE, GRAY, GREEN, ORANGE, Html, axes_of, escaped, figure_html
from clip_jax.evaluation.report.page import metric_name, page, percent, table, title_of
from clip_jax.evaluation.results import REFERENCES, mark, not_above

RESAMPLES = 1_000
CONFIDENCE = 95  # per cent
CHUNK = 8_000_000  # draws at a time; bounds the memory
COLORS = (BLUE, ORANGE, GREEN, GRAY, "#8250df", "#bf3989", "#0a7ea4", "#9a6700")

Statistic = Callable[[np.ndarray], np.ndarray]  # from indices [R, M] of drawn examples to values [R]


class Estimate(NamedTuple):
    """A share or a difference of shares, and its interval; ``low`` and ``high`` are None without an interval."""

    value: float
    low: float | None = None
    high: float | None = None


class TaskComparison(NamedTuple):
    """The comparison of one task. Lists have one entry for each model.

    Attributes:
      name, title, metric: those of the task.
      values: the main metric; None for a model without this task.
      differences: to the first model with this task; None for that model.
      not_above: the names of the references, such as chance, that the value does not exceed.
      notes: sentences on differences in more than the model, such as in the number of images.
    """

    name: str
    title: str
    metric: str
    values: list[Estimate | None]
    differences: list[Estimate | None]
    not_above: list[list[str]]
    notes: list[str]


class Comparison(NamedTuple):
    """The names of the models, in the order of the folders, and the tasks that at least two have."""

    models: list[str]
    tasks: list[TaskComparison]

    def table(self) -> str:
        """Returns text with a block for each task and a line for each model."""
        width = max(map(len, self.models))
        lines = [f"{CONFIDENCE} % intervals, {RESAMPLES:,} resamples; differences are to the first model, in points"]
        for task in self.tasks:
            lines += ["", f"{task.title}: {metric_name(task.metric)}, %"]
            rows = zip(self.models, task.values, task.differences, task.not_above, strict=True)
            for model, value, difference, low in rows:
                if value:
                    row = f"  {model:{width}}  {format_estimate(value):24}{format_estimate(difference, sign=True):24}"
                    lines.append((row + mark(low)).rstrip())
            lines += [f"  note: {note}" for note in task.notes]
        return "\n".join(lines)


def format_estimate(estimate: Estimate | None, sign: bool = False) -> str:
    """Returns a text such as ``63.2 [62.8, 63.6]``, in per cent; empty for None."""
    if estimate is None:
        return ""
    value, low, high = estimate
    interval = "" if low is None else f" [{percent(low, sign)}, {percent(high, sign)}]"
    return percent(value, sign) + interval


def statistic_of(metric: str, arrays: dict[str, np.ndarray]) -> tuple[int, Statistic] | None:
    """Returns the number of examples and a function that computes the metric of drawn examples.

    Args:
      metric: a key of :attr:`clip_jax.evaluation.results.TaskResult.metrics`.
      arrays: as in :attr:`clip_jax.evaluation.results.TaskResult.arrays`.

    Returns:
      None if the arrays do not have what the metric needs.
    """
    labels, best = arrays.get("labels"), arrays.get("best")
    if metric in ("top_1", "top_5", "mean_per_class"):
        if labels is None or best is None or not len(labels):
            return None
        hits = (best[:, : 5 if metric == "top_5" else 1] == labels[:, None]).any(axis=1)
        return len(hits), _mean_per_class(hits, labels) if metric == "mean_per_class" else _mean(hits)
    direction, at, depth = metric.partition("_recall@")
    ranks = arrays.get(f"{direction}_rank")
    if not at or ranks is None or not len(ranks):
        return None
    return len(ranks), _mean(ranks < int(depth))


def _mean(hits: np.ndarray) -> Statistic:
    return lambda drawn: hits[drawn].mean(axis=1)


def _mean_per_class(hits: np.ndarray, labels: np.ndarray) -> Statistic:
    classes = int(labels.max()) + 1

    def statistic(drawn: np.ndarray) -> np.ndarray:
        cells = (labels[drawn] + classes * np.arange(len(drawn))[:, None]).ravel()
        counts = np.bincount(cells, minlength=classes * len(drawn)).reshape(-1, classes)
        right = np.bincount(cells, hits[drawn].ravel(), classes * len(drawn)).reshape(-1, classes)
        # A class that was not drawn has no recall and does not count.
        return (right / np.maximum(counts, 1)).sum(axis=1) / (counts > 0).sum(axis=1)

    return statistic


def bootstrap(examples: int, statistic: Statistic, seed: int = 0) -> np.ndarray:
    """Returns the statistic of random resamples of ``examples`` examples, float64 ``[RESAMPLES]``."""
    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK // examples)
    values = []
    for start in range(0, RESAMPLES, chunk):
        size = (min(chunk, RESAMPLES - start), examples)
        values.append(statistic(generator.integers(examples, size=size, dtype=np.int32)))
    return np.concatenate(values)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the bounds of the middle ``CONFIDENCE`` per cent of resampled values ``[R]``."""
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def compare(folders: Sequence[epath.Path]) -> Comparison:
    """Compares the evaluations in these folders, written by :func:`clip_jax.evaluation.results.write_results`.

    Raises:
      FileNotFoundError: a folder has no results.
      ValueError: there are fewer than two folders, no two have the same task, or a file is damaged.
    """
    folders = [epath.Path(folder) for folder in folders]
    if len(folders) < 2:
        raise ValueError("a comparison needs at least two folders")
    records = [_read_results(folder) for folder in folders]
    names = [title_of(record["model"]) for record in records]
    if len(set(names)) < len(names):
        names = [record["model"] for record in records]
    models = [
        f"{name} ({folder})" if names.count(name) > 1 else name for name, folder in zip(names, folders, strict=True)
    ]
    every = dict.fromkeys(task for record in records for task in record["tasks"])
    common = [task for task in every if sum(task in record["tasks"] for record in records) > 1]
    if not common:
        raise ValueError(f"no task was evaluated in two of {', '.join(map(str, folders))}")
    return Comparison(models, [_compare_task(task, models, folders, records) for task in common])


def _compare_task(
    name: str, models: Sequence[str], folders: Sequence[epath.Path], records: Sequence[dict]
) -> TaskComparison:
    entries = [record["tasks"].get(name) for record in records]
    first = next(index for index, entry in enumerate(entries) if entry)
    metric = entries[first]["metric"]
    arrays = [_read_arrays(folder, name) if entry else {} for folder, entry in zip(folders, entries, strict=True)]
    statistics = [statistic_of(metric, array) for array in arrays]
    resampled = [bootstrap(*statistic) if statistic else None for statistic in statistics]
    values: list[Estimate | None] = []
    differences: list[Estimate | None] = []
    low: list[list[str]] = []
    notes: list[str] = []
    for index, (entry, drawn) in enumerate(zip(entries, resampled, strict=True)):
        value = entry["metrics"].get(metric, math.nan) if entry else None
        values.append(_estimate(value, drawn))
        low.append(not_above(entry["levels"], metric, value) if entry else [])
        if value is None or index == first:
            differences.append(None)
            continue
        changes = _changes(entries[first], entry)
        same = (
            _same_examples(arrays[first], arrays[index], metric) and not {"images", "classes", "texts"} & changes.keys()
        )
        paired = same and drawn is not None and resampled[first] is not None
        differences.append(_estimate(value - values[first].value, drawn - resampled[first] if paired else None))
        if not same and arrays[first] and arrays[index]:
            changes.setdefault("images", "other questions")
        if changes:
            notes.append(
                f"{models[index]} differs from {models[first]} in more than the model: {', '.join(changes.values())}"
            )
    return TaskComparison(name, entries[first]["title"] or name, metric, values, differences, low, notes)


def _changes(first: dict, other: dict) -> dict[str, str]:
    """Returns the differences of two results of a task as phrases, by ``images``, ``classes`` and so on."""
    changes = {}
    for what in dict.fromkeys([*first["counts"], *other["counts"]]):
        counts = [entry["counts"].get(what) for entry in (other, first)]
        if counts[0] != counts[1]:
            changes[what] = f"{' instead of '.join('no' if count is None else f'{count:,}' for count in counts)} {what}"
    for what in first["identity"].keys() & other["identity"].keys():
        if first["identity"][what] != other["identity"][what]:
            changes.setdefault(what, f"other {'classes or labels' if what == 'classes' else what}")
    if first["metric"] != other["metric"]:
        changes["metric"] = f"its metric is {metric_name(other['metric'])}"
    return changes


def _estimate(value: float | None, drawn: np.ndarray | None) -> Estimate | None:
    if value is None:
        return None
    return Estimate(value) if drawn is None else Estimate(value, *interval(drawn))


def _same_examples(first: dict[str, np.ndarray], second: dict[str, np.ndarray], metric: str) -> bool:
    """Whether two models were scored on the same examples, as far as the arrays show."""
    if "labels" in first and "labels" in second:
        return np.array_equal(first["labels"], second["labels"])
    rank = f"{metric.partition('_recall@')[0]}_rank"
    return len(first.get(rank, ())) == len(second.get(rank, ()))


def _read_results(folder: epath.Path) -> dict:
    path = folder / "results.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; python -m clip_jax.evaluate --model=... --output={folder} writes it"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        model = record["model"]
        tasks = {
            name: {
                "title": task.get("title", ""),
                "metric": task["metric"],
                "metrics": {metric: float(value) for metric, value in task["metrics"].items()},
                "counts": {what: int(count) for what, count in task.get("counts", {}).items()},
                "identity": dict(task.get("identity", {})),
                "levels": {key: {name: float(v) for name, v in task.get(key, {}).items()} for key in REFERENCES},
            }
            for name, task in record["tasks"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} was not written by an evaluation; evaluate again to write it") from None
    return {"model": str(model), "tasks": tasks}


def _read_arrays(folder: epath.Path, task: str) -> dict[str, np.ndarray]:
    path = folder / "arrays" / f"{task}.npz"
    if not path.exists():
        return {}
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"{path} is damaged; evaluate again to write it") from None


def comparison_figure(comparison: Comparison, differences: bool) -> Figure:
    """Draws a row for each task and a point with its interval for each model.

    Args:
      comparison: of the models.
      differences: whether points are differences to the first model, instead of the metric itself.
    """
    rows = [task.differences if differences else task.values for task in comparison.tasks]
    models = len(comparison.models)
    figure, axes = axes_of(5.4, 1.2 + 0.2 * models + len(rows) * (0.36 + 0.16 * models))
    for model, name in enumerate(comparison.models):
        points = [(row, estimates[model]) for row, estimates in enumerate(rows) if estimates[model]]
        if not points:
            continue
        heights = [row + 0.65 * (model + 0.5) / models for row, _ in points]
        shares = [100 * estimate.value for _, estimate in points]
        color = COLORS[model % len(COLORS)]
        axes.plot(shares, heights, "o", color=color, markersize=5, label=_plain(name))
        for height, (_, (_, low, high)) in zip(heights, points, strict=True):
            if low is not None:
                axes.plot([100 * low, 100 * high], [height, height], color=color, linewidth=2)
    # Titles are above their rows: next to them, they would leave no width on a phone.
    for row, task in enumerate(comparison.tasks):
        axes.text(0, row - 0.08, _plain(task.title), transform=axes.get_yaxis_transform(), fontsize=9)
    axes.set_yticks([])
    axes.set_ylim(len(rows) - 0.2, -0.45)
    axes.set_xlabel("difference to the first model, points" if differences else "%")
    if differences:
        axes.axvline(0, color=GRAY, linewidth=1)
    figure.legend(loc="outside upper left", fontsize=9)
    return figure


def _plain(text: str) -> str:
    # matplotlib reads text between $ as mathematics.
    return text.replace("$", r"\$")


def _marked(estimate: Estimate, low: list[str]) -> Html:
    mark = f' <span class="low">not above {escaped(", ".join(low))}</span>' if low else ""
    return Html(f"<div>{escaped(format_estimate(estimate))}{mark}</div>")


def write_comparison(folder: epath.Path, comparison: Comparison) -> None:
    """Writes ``folder/comparison.html``, one page that needs no other file."""
    shown = {
        "Main metric of each task": comparison_figure(comparison, differences=False),
        "Differences to the first model": comparison_figure(comparison, differences=True),
    }
    figures = [figure_html(figure, f"{caption}, with intervals", caption) for caption, figure in shown.items()]
    body = [
        Html("<h1>Comparison</h1>"),
        Html(f"<ol>{''.join(f'<li>{escaped(model)}</li>' for model in comparison.models)}</ol>"),
        Html(
            f"<p>Brackets and lines: {CONFIDENCE} % intervals from {RESAMPLES:,} resamples of the images or queries. "
            "Differences are to the first model that has the task. If both answered the same questions, they are "
            "compared question by question. If the interval of a difference does not contain 0, the difference is "
            "unlikely to depend on which images the task has. A note below a task states if its results differ in "
            "more than the model.</p>"
        ),
        Html(f'<div class="plots">{"".join(figures)}</div>'),
    ]
    for task in comparison.tasks:
        rows = [
            [model, _marked(value, low), format_estimate(difference, sign=True)]
            for model, value, difference, low in zip(
                comparison.models, task.values, task.differences, task.not_above, strict=True
            )
            if value
        ]
        body.append(Html(f"<h3>{escaped(task.title)}</h3>"))
        body.append(table(["model", f"{metric_name(task.metric)}, %", "difference, points"], rows, stack=True))
        body += [Html(f'<p class="low">Note: {escaped(note)}.</p>') for note in task.notes]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.html").write_text(page("clip_jax: comparison", body), encoding="utf-8")
