"""The report of an evaluation: one HTML page that needs nothing beside itself, for a reader who is new here."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources

import numpy as np
from etils import epath

from clip_jax.evaluation.figures import (
    Html,
    curves_figure,
    escaped,
    figure_html,
    picture_html,
    reliability_figure,
    shift_figure,
    synthetic_shift_figure,
)
from clip_jax.evaluation.registry import TASKS
from clip_jax.evaluation.results import MissingTask, Results, TaskResult
from clip_jax.evaluation.retrieval import RECALL_AT
from clip_jax.evaluation.robustness import LEAST_SHARE, effective_robustness, fit_standard_line

MISTAKES, WORST_CLASSES, SHOWN_PREDICTIONS, SHOWN_QUERIES = 12, 10, 3, 12
SAMPLES, ALL_SAMPLES = 36, 180  # of a task, and about so many of all together: what keeps a page of 30 tasks small
DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}
SHORT = {
    "top_1": "top-1",
    "top_5": "top-5",
    "mean_per_class": "mean per class",
    "mean_top_1_top_5": "mean of top-1 and top-5",
    "calibration_error": "calibration error",
    "average_precision_11": "11-point average precision",
    "roc_auc": "ROC AUC",
}
MEANING = {
    "top_1": "the share of pictures whose right class is the model's first answer.",
    "top_5": "the share of pictures whose right class is among the model's first five answers.",
    "mean_top_1_top_5": "the mean of those two.",
    "mean_per_class": "the share of right first answers within each class, averaged over the classes, so that rare "
    "classes count as much as frequent ones.",
    "calibration_error": "how far the probability that the model states and the share of answers that are right lie "
    "apart on average; 0 is best.",
    "average_precision_11": "for pictures that show several classes: how well each class's pictures are ranked before "
    "all others, averaged over the classes.",
    "roc_auc": "the probability that a picture of the class is ranked before one that is not; 50 % is guessing.",
    "recall": "recall@k is the share of queries with a right answer among the first k; image to text asks with a "
    "picture for its text, text to image the other way round.",
    "chance": "what guessing gets.",
    "baseline": "nearest mean picture: what comparing pixels with each class's average training picture gets, without "
    "any learning.",
    "linear_probe": "a linear classifier trained on the model's picture embeddings, with labels: how much the "
    "embeddings hold, whatever the text tower makes of it.",
    "synthetic_shift": "the same pictures made worse by blur, noise and the like, at five strengths.",
    "effective_robustness": "accuracy on pictures of another kind, minus what models trained on ImageNet reach that "
    "are as accurate on ImageNet itself; above 0 is better.",
}


def load_published() -> dict:
    """Other models' numbers as ``published.json`` has them; empty if that does not ship."""
    file = resources.files("clip_jax.evaluation") / "published.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_report(
    folder: epath.Path, results: Results, history: Sequence[dict[str, float]] = (), published: dict | None = None
) -> None:
    """Writes ``folder/report.html``.

    Args:
      folder: made if it is not there.
      results: may be without any task.
      history: what :func:`clip_jax.training.metrics.read_metrics` gives; empty for weights that were not trained here.
      published: instead of :func:`load_published`.
    """
    published = load_published() if published is None else published
    anchors = {task.name: f"task-{number}" for number, task in enumerate(results.tasks, 1)}
    samples = max(MISTAKES, min(SAMPLES, ALL_SAMPLES // max(1, len(results.tasks))))
    body = [_introduction(results), _summary(results.tasks, anchors), _meanings(results.tasks, published)]
    body += [_training(history, results.tasks), _natural_shift(results.tasks, published)]
    for task in results.tasks:
        section = _retrieval(task, published) if task.kind == "retrieval" else _zero_shot(task, published, samples)
        body.append(Html(f'<section id="{anchors[task.name]}"><h2>{escaped(_title(task))}</h2>{section}</section>'))
    body.append(_missing(results.missing))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(page(f"clip_jax: {results.model}", body), encoding="utf-8")


def percent(share: float | None, sign: bool = False) -> str:
    """A share as per cent, with a second decimal where there is little; a dash for None and what is not a number."""
    if share is None or not np.isfinite(share):
        return "–"
    decimals = 2 if 0 < abs(share) < 0.01 else 1
    return f"{100 * share:{'+' if sign else ''}.{decimals}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> Html:
    """A table that scrolls within itself; its first ``texts`` columns are words, the others numbers."""

    def row(tag: str, cells: Sequence[object]) -> str:
        kinds = ["" if column < texts else ' class="number"' for column in range(len(cells))]
        return "".join(f"<{tag}{kind}>{escaped(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    lines = "\n".join(f"<tr>{row('td', cells)}</tr>" for cells in rows)
    return Html(f'<div class="scroll"><table><thead><tr>{row("th", head)}</tr></thead>\n{lines}</table></div>')


def page(title: str, body: Sequence[str]) -> str:
    """The whole page around the pieces of HTML in ``body``."""
    return _PAGE.format(title=escaped(title), body="\n".join(piece for piece in body if piece))


def _join(*pieces: str) -> Html:
    return Html("\n".join(piece for piece in pieces if piece))


def _title(task: TaskResult | MissingTask) -> str:
    return task.title or task.name


def metric_name(metric: str) -> str:
    """A metric's name for people."""
    direction, _, recall = metric.rpartition("_")
    return f"{DIRECTIONS[direction]}, {recall}" if direction in DIRECTIONS else SHORT.get(metric, metric)


def _introduction(results: Results) -> Html:
    architecture = f"<p class='quiet'>{escaped(results.architecture)}</p>" if results.architecture else ""
    return Html(
        f"<h1>{escaped(results.model)}</h1>{architecture}"
        "<p>A CLIP places pictures and texts in one space, where a picture lies near the texts that describe it. "
        "In <b>zero-shot classification</b> it is shown a picture and the names of all classes, and answers with the "
        "name that lies nearest; it was never trained to classify. In <b>retrieval</b> it is to find a picture's text "
        "among all texts, or a text's picture among all pictures.</p>"
    )


def _summary(tasks: list[TaskResult], anchors: dict[str, str]) -> Html:
    if not tasks:
        return Html("<p>Nothing was evaluated.</p>")
    rows = []
    for task in tasks:
        link = Html(f'<a href="#{anchors[task.name]}">{escaped(_title(task))}</a>')
        value = Html(f"<b>{percent(task.metrics.get(task.metric))}</b>")
        others = [percent(values.get(task.metric)) for values in (task.chance, task.baseline)]
        images, choices = task.counts.get("images"), task.counts.get("classes", task.counts.get("texts"))
        counts = ["–" if count is None else f"{count:,}" for count in (images, choices)]
        rows.append([link, metric_name(task.metric), value, *others, *counts])
    head = ["task", "metric", "this model, %", "chance, %", "baseline, %", "images", "classes or texts"]
    return _join("<h2>Summary</h2>", table(head, rows, texts=2))


def _meanings(tasks: list[TaskResult], published: dict) -> Html:
    """A sentence for each kind of number that is on the page."""
    used = {name for task in tasks for name in task.metrics}
    used |= {"recall"} if any("recall@" in name for name in used) else set()
    for name in ("chance", "baseline", "linear_probe", "synthetic_shift"):
        used |= {name} if any(getattr(task, name) for task in tasks) else set()
    used |= {"effective_robustness"} if _shifts(tasks, published) else set()
    entries = "".join(
        f"<dt>{escaped(SHORT.get(name, name.replace('_', ' ')))}</dt><dd>{escaped(sentence)}</dd>"
        for name, sentence in MEANING.items()
        if name in used
    )
    return Html(f"<h2>What the numbers mean</h2><dl>{entries}</dl>" if entries else "")


def _training(history: Sequence[dict[str, float]], tasks: list[TaskResult]) -> Html:
    figures = []
    losses = _curve(history, "loss")
    if losses:
        alt = f"Training loss over the steps, last {losses[1][-1]:.3f}"
        figures.append(figure_html(curves_figure({"loss": losses}, ylabel="loss"), alt, "Training loss"))
    accuracies = {name: _curve(history, f"{key}_accuracy", 100) for key, name in DIRECTIONS.items()}
    accuracies = {name: curve for name, curve in accuracies.items() if curve}
    if accuracies:
        caption = "Accuracy within the batch: how often a picture's own text is the nearest one of its batch"
        figures.append(figure_html(curves_figure(accuracies, ylabel="accuracy, %"), caption))
    names = dict.fromkeys(key.rpartition("/")[0] for record in history for key in record if "/" in key)
    results = {task.name: task for task in tasks}
    figures += [_task_history(history, name, results.get(name)) for name in names]
    return Html(f'<h2>Training</h2><div class="plots">{_join(*figures)}</div>' if any(figures) else "")


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
    levels = {metric_name(metric): 100 * value for metric, value in (task.baseline if task else {}).items()}
    title = _title(task) if task else name
    figure = curves_figure(curves, levels, ylabel="%", ylim=(0, None))
    return figure_html(figure, f"{title}: {' and '.join(curves)} over the steps of training", title)


def _published_row(published: dict, task: str, tables: Sequence[str]) -> tuple[str, list[str], list[float | None]]:
    """Source, models, and their shares in [0, 1] or None; empty where no table has the task."""
    row = next((entry.published for entry in TASKS if entry.name == task), "") or task
    for name in tables:
        values = published.get(name, {}).get("tasks", {}).get(row)
        if any(value is not None for value in values or ()):
            shares = [None if value is None else value / 100 for value in values]
            return published[name].get("source", ""), published[name]["models"], shares
    return "", [], []


def _shifts(tasks: list[TaskResult], published: dict) -> list[TaskResult]:
    """The natural shifts of ImageNet among the tasks; empty without ImageNet itself."""
    if not any(task.name == "imagenet" for task in tasks):
        return []
    tables = ("shift", "standard_models")
    known = {row for name in tables for row in published.get(name, {}).get("tasks", {})} - {"imagenet"}
    rows = {entry.name: entry.published for entry in TASKS if entry.published}
    return [task for task in tasks if rows.get(task.name, task.name) in known]


def _natural_shift(tasks: list[TaskResult], published: dict) -> Html:
    shifts = _shifts(tasks, published)
    if not shifts:
        return Html("")
    imagenet = next(task.metrics[task.metric] for task in tasks if task.name == "imagenet")
    groups = {
        "trained on ImageNet": ("standard_models",),
        "OpenAI's CLIPs, zero-shot": ("shift", "zero_shot", "shift_paper"),
    }
    average = f"average of {len(shifts)}"
    sets = [(average, shifts)] if len(shifts) > 1 else []
    sets += [(_title(task), [task]) for task in shifts]
    figures, rows = [], []
    for title, chosen in sets:
        here = float(np.mean([task.metrics[task.metric] for task in chosen]))
        points = {
            name: _points([_published_row(published, task, tables) for task in _names(chosen)])
            for name, tables in groups.items()
        }
        standard = points["trained on ImageNet"]
        # A model with next to no right answers, as ResNet-50 on the set made of its mistakes, has no place on a line.
        fitted = [(x, y) for x, y in zip(*standard, strict=True) if min(y, 1 - y) > LEAST_SHARE]
        line = fit_standard_line(*zip(*fitted, strict=True)) if len({x for x, _ in fitted}) > 1 else None
        gain = effective_robustness(imagenet, here, line) if line else None
        figure = shift_figure(points, (imagenet, here), line, xlabel="ImageNet, %", ylabel="shift, %")
        alt = f"{title}: {percent(here)} % against {percent(imagenet)} % on ImageNet"
        figures.append(figure_html(figure, alt))
        rows.append([title, percent(here), percent(gain, sign=True)])
    rows_used = [_published_row(published, name, tables) for name in _names(shifts) for tables in groups.values()]
    sources = {source for source, _, _ in rows_used} - {""}
    source = f"Other models' numbers: {'; '.join(sorted(sources))}." if sources else ""
    return _join(
        "<h2>Natural distribution shift</h2>",
        "<p>The same classes as ImageNet's in pictures of another kind. Both axes are stretched towards 0 and 100 % "
        "(logits), where models trained on ImageNet fall on a line; a model above the line is more robust than its "
        "ImageNet accuracy promises.</p>",
        table(["shift", "accuracy, %", "effective robustness, points"], rows),
        f'<div class="plots">{_join(*figures)}</div>',
        f'<p class="quiet">{escaped(source)}</p>' if source else "",
    )


def _names(shifts: list[TaskResult]) -> list[str]:
    return ["imagenet", *(task.name for task in shifts)]


def _points(rows: list[tuple[str, list[str], list[float | None]]]) -> tuple[list[float], list[float]]:
    """Accuracies on ImageNet, the first row, and averaged over the others, of the models that all rows have."""
    by_model = [
        {model: share for model, share in zip(row[1], row[2], strict=False) if share is not None} for row in rows
    ]
    models = [model for model in by_model[0] if all(model in row for row in by_model[1:])]
    averages = [float(np.mean([row[model] for row in by_model[1:]])) for model in models]
    return [by_model[0][model] for model in models], averages


def _metrics_table(task: TaskResult) -> Html:
    columns = {"this model, %": task.metrics, "chance, %": task.chance, "nearest mean picture, %": task.baseline}
    columns = {name: values for name, values in columns.items() if values}
    names = sorted(task.metrics, key=lambda name: name != task.metric)
    rows = [[metric_name(name), *(percent(values.get(name)) for values in columns.values())] for name in names]
    return table(["metric", *columns], rows)


def _published_table(task: TaskResult, published: dict) -> Html:
    """This model beside those that OpenAI published; empty where nothing is known of them."""
    main = task.metrics.get(task.metric)
    # Table 10 has the data set's own metric, of which a probe knows these two.
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
    return _join(
        "<h3>Beside the CLIPs that OpenAI published</h3>",
        table(["%", "this model", *models], rows),
        *(f'<p class="quiet">{escaped(source)}</p>' for source in sources),
    )


def _zero_shot(task: TaskResult, published: dict, samples: int) -> Html:
    return _join(
        f"<p>{task.counts.get('images', 0):,} pictures, {task.counts.get('classes', 0):,} classes.</p>",
        _metrics_table(task),
        _published_table(task, published),
        _linear_probe(task),
        *(f"<p>{escaped(note)}</p>" for note in task.notes),
        _zero_shot_plots(task),
        _confusions(task),
        _picture_grids(task, samples),
    )


def _linear_probe(task: TaskResult) -> Html:
    if not task.linear_probe:
        return Html("")
    values = {
        name: f"{value:,}" if isinstance(value, int) else f"{value:.4g}" for name, value in task.linear_probe.items()
    }
    if "accuracy" in values:
        values = {"accuracy, %": percent(task.linear_probe["accuracy"])} | values
        del values["accuracy"]
    return _join("<h3>Linear probe</h3>", table(list(values), [list(values.values())], texts=0))


def _zero_shot_plots(task: TaskResult) -> Html:
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
    return _join(f'<div class="plots">{_join(*figures)}</div>' if figures else "", below)


def _class_name(task: TaskResult, index: int) -> str:
    return task.class_names[index] if index < len(task.class_names) else f"class {index}"


def _confusions(task: TaskResult) -> Html:
    labels, best = task.arrays.get("labels"), task.arrays.get("best")
    if labels is None or best is None or not len(labels):
        return Html("")
    first = best[:, 0]
    pictures = np.bincount(labels)
    right = np.bincount(labels[first == labels], minlength=len(pictures))
    present = np.flatnonzero(pictures)
    recall = right[present] / pictures[present]
    probabilities = task.arrays.get("probabilities", np.zeros(best.shape))
    certainty = np.bincount(labels, probabilities[:, 0])[present] / pictures[present]
    # Among equally bad classes those with most pictures say most, then those that the model is surest about.
    worst = np.lexsort((-certainty, -pictures[present], recall))[:WORST_CLASSES]
    rows = []
    for label, share in zip(present[worst], recall[worst], strict=True):
        answers = Counter(first[(labels == label) & (first != labels)].tolist()).most_common(3)
        taken_for = ", ".join(f"{_class_name(task, answer)} ({count:,})" for answer, count in answers)
        rows.append([_class_name(task, label), taken_for or "–", f"{pictures[label]:,}", percent(float(share))])
    never = int((recall == 0).sum())
    sentence = f"{never:,} of {len(present):,} classes are never recognised." if never else ""
    return _join(
        "<h3>Classes with the lowest recall</h3>",
        f"<p>{sentence} Beside each, what its pictures are taken for, and how often.</p>",
        table(["class", "taken for (times)", "pictures", "recognised, %"], rows, texts=2),
    )


def _picture_grids(task: TaskResult, samples: int) -> Html:
    best, labels = task.arrays.get("best"), task.arrays.get("labels")
    if task.picture is None or best is None or not len(best):
        return Html("")
    pieces = []
    if labels is not None and "probabilities" in task.arrays:
        wrong = np.flatnonzero(best[:, 0] != labels)
        surest = wrong[np.argsort(-task.arrays["probabilities"][wrong, 0], kind="stable")][:MISTAKES]
        if len(surest):
            heading = "<h3>Mistakes that the model is surest about</h3><p>Above the right class, below its answer.</p>"
            pieces.append(_join(heading, _grid(_prediction(task, int(index), 1) for index in surest)))
    chosen = np.sort(np.random.default_rng(0).choice(len(best), min(samples, len(best)), replace=False))
    right = "" if labels is None else " The right class is above them, and marked ✓ where the model names it."
    heading = f"<h3>Pictures drawn at random</h3><p>With the model's first {SHOWN_PREDICTIONS} answers.{right}</p>"
    pieces.append(_join(heading, _grid(_prediction(task, int(index), SHOWN_PREDICTIONS) for index in chosen)))
    return _join(*pieces)


def _grid(figures: Iterable[str]) -> Html:
    return Html(f'<div class="pictures">{_join(*figures)}</div>')


def _prediction(task: TaskResult, index: int, count: int) -> Html:
    labels, best, probabilities = (task.arrays.get(name) for name in ("labels", "best", "probabilities"))
    label = None if labels is None else int(labels[index])
    name = f"picture {index}" if label is None else _class_name(task, label)
    answers = []
    for rank, answer in enumerate(best[index, :count].tolist()):
        probability = "" if probabilities is None else f"{percent(float(probabilities[index, rank]))} %"
        kind, mark = ("right", "✓ ") if answer == label else ("wrong", "")
        text = f"{mark}{_class_name(task, answer)}"
        answers.append(f'<li class="{kind}">{escaped(text)} <span class="quiet">{probability}</span></li>')
    title = "" if label is None else f"<b>{escaped(name)}</b>"
    numbered = ' class="single"' if count == 1 else ""
    picture = picture_html(task.picture(index), name)
    return Html(f"<figure>{picture}<figcaption>{title}<ol{numbered}>{''.join(answers)}</ol></figcaption></figure>")


def _retrieval(task: TaskResult, published: dict) -> Html:
    depths = [k for k in RECALL_AT if any(f"{direction}_recall@{k}" in task.metrics for direction in DIRECTIONS)]
    rows = []
    for direction, name in DIRECTIONS.items():
        for who, values in (("", task.metrics), (", chance", task.chance)):
            recalls = [values.get(f"{direction}_recall@{k}") for k in depths]
            if any(recall is not None for recall in recalls):
                rows.append([name + who, *map(percent, recalls)])
    return _join(
        f"<p>{task.counts.get('images', 0):,} pictures, {task.counts.get('texts', 0):,} texts.</p>",
        table(["recall, %", *(f"@{k}" for k in depths)], rows),
        _published_table(task, published),
        _queries(task),
    )


def _queries(task: TaskResult) -> Html:
    best, right = task.arrays.get("best_images"), task.arrays.get("right_images")
    if task.picture is None or best is None or right is None or not len(best):
        return Html("")
    pieces = ["<h3>Texts, and the pictures nearest to them</h3><p>Those that belong to the text are marked ✓.</p>"]
    for text, images, marks in list(zip(task.texts, best, right, strict=False))[:SHOWN_QUERIES]:
        figures = []
        for rank, (image, mark) in enumerate(zip(images.tolist(), marks.tolist(), strict=True), 1):
            kind, label = ("right", f"✓ {rank}") if mark else ("wrong", f"{rank}")
            picture = picture_html(task.picture(image), f"picture {image}, place {rank}{', right' if mark else ''}")
            figures.append(f'<figure class="{kind}">{picture}<figcaption>{label}</figcaption></figure>')
        pieces.append(f'<div class="query"><p>{escaped(text)}</p><div class="row">{"".join(figures)}</div></div>')
    return _join(*pieces)


def _missing(missing: list[MissingTask]) -> Html:
    if not missing:
        return Html("")
    rows = [[_title(task), task.reason, task.how_to_get] for task in missing]
    return _join("<h2>Not evaluated</h2>", table(["task", "why", "how to get it"], rows, texts=3))


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --quiet: #57606a; --card: #f6f8fa; --line: #d8dee4; --right: #1a7f37;
  --shadow: #0003 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --quiet: #9aa4af; --card: #20262d; --line: #3a424b; --right: #4ac26b; --shadow: #fff4 }}
  a {{ color: #79b8ff }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto 4rem; padding: 0 1rem }}
h1, h2, h3, p, dd, td {{ overflow-wrap: anywhere }}
h1 {{ font-size: 1.7rem; line-height: 1.25; margin: 0 }}
h2 {{ font-size: 1.3rem; margin: 3rem 0 0.6rem; padding-top: 0.8rem; border-top: 1px solid var(--line) }}
h3 {{ font-size: 1.05rem; margin: 2rem 0 0.4rem }}
p, dl {{ max-width: 46rem; margin: 0.4rem 0 0.8rem }}
dt {{ font-weight: 600 }}
dd {{ margin: 0 0 0.4rem }}
@media (min-width: 46rem) {{
  dl {{ display: grid; grid-template-columns: 10rem 1fr; max-width: 58rem }}
}}
.quiet {{ color: var(--quiet); font-weight: 400; font-size: 14px }}
li .quiet {{ white-space: nowrap }}
/* A shadow on the side where a table goes on: covers that move with the table lie over shadows that do not. */
.scroll {{ overflow-x: auto; margin: 0.6rem 0 1rem;
  background: linear-gradient(90deg, Canvas 40%, transparent) 0 0 / 3rem 100% no-repeat local,
    linear-gradient(270deg, Canvas 40%, transparent) 100% 0 / 3rem 100% no-repeat local,
    linear-gradient(90deg, var(--shadow), transparent) 0 0 / 0.8rem 100% no-repeat scroll,
    linear-gradient(270deg, var(--shadow), transparent) 100% 0 / 0.8rem 100% no-repeat scroll }}
table {{ border-collapse: collapse; font-size: 15px }}
th, td {{ padding: 0.35rem 0.8rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }}
th {{ font-size: 14px; color: var(--quiet); font-weight: 600; vertical-align: bottom }}
td:not(.number) {{ min-width: 7rem; max-width: 26rem }}
.number {{ text-align: right; font-variant-numeric: tabular-nums }}
td.number {{ white-space: nowrap }}
@media (max-width: 40rem) {{
  th, td {{ padding: 0.35rem 0.5rem }}
}}
details {{ margin: 0.6rem 0 }}
summary {{ cursor: pointer }}
figure {{ margin: 0 }}
img {{ display: block; background: #fff; border-radius: 4px }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.5rem;
  margin: 1rem 0; align-items: start }}
.plot {{ width: 100%; max-width: 34rem; height: auto }}
.plots figcaption {{ font-size: 14px; color: var(--quiet); margin-top: 0.3rem; overflow-wrap: anywhere }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.8rem }}
.pictures figure {{ background: var(--card); border-radius: 6px; padding: 0.6rem; font-size: 14px; line-height: 1.35 }}
.pictures img {{ width: 100%; max-width: 10rem; height: auto; margin: 0 auto 0.5rem }}
.pictures b {{ overflow-wrap: anywhere }}
ol {{ margin: 0.3rem 0 0; padding-left: 1.2rem; overflow-wrap: anywhere }}
ol.single {{ list-style: none; padding: 0 }}
.right {{ color: var(--right); font-weight: 600 }}
.query p {{ margin: 1rem 0 0.3rem }}
.row {{ display: grid; grid-template-columns: repeat(5, minmax(0, 7rem)); gap: 0.5rem; font-size: 14px }}
.row img {{ width: 100%; height: auto; box-sizing: border-box; border: 3px solid transparent }}
.row .right img {{ border-color: var(--right) }}
.row figcaption {{ text-align: center }}
</style>
{body}
</html>
"""
