"""The report of a finished run: curves and predicted pictures as PNG, and one self-contained HTML page."""

import base64
import html
import io

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from clip_jax.evaluation.tasks import EvaluationResults, Evaluations, LabelledPictures
from clip_jax.training.metrics import read_metrics

GRID_ROWS, GRID_COLUMNS = 6, 6
RIGHT, WRONG = "#1a7f37", "#57606a"


def loss_figure(metrics: list[dict[str, float]]) -> Figure:
    """Loss, and both accuracies within the batch, over the steps."""
    records = [record for record in metrics if "loss" in record]
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(steps, [record["loss"] for record in records])
    loss.set(xlabel="step", title="training loss")
    for direction in ("image_to_text", "text_to_image"):
        accuracy.plot(
            steps, [100 * record[f"{direction}_accuracy"] for record in records], label=direction.replace("_", " ")
        )
    accuracy.set(xlabel="step", title="accuracy within the batch, %")
    accuracy.legend()
    return figure


def accuracy_figure(metrics: list[dict[str, float]], results: EvaluationResults) -> Figure:
    """Zero-shot accuracy over the steps, with the baseline as dashed lines."""
    records = [record for record in metrics if "zero_shot/top_1" in record]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for k in (1, 5):
        steps = [record["step"] for record in records]
        (line,) = axes.plot(steps, [100 * record[f"zero_shot/top_{k}"] for record in records], "o-", label=f"top-{k}")
        if results.pixel_baseline:
            height = 100 * results.pixel_baseline[f"top_{k}"]
            axes.axhline(height, color=line.get_color(), linestyle="--", label=f"nearest mean picture, top-{k}")
    axes.set(xlabel="step", title="zero-shot accuracy, %", ylim=(0, None))
    axes.legend()
    return figure


def predictions_figure(pictures: LabelledPictures, scores: np.ndarray) -> Figure:
    """A grid of pictures, drawn at random with a fixed seed, each with its label and first three predictions."""
    count = min(GRID_ROWS * GRID_COLUMNS, len(pictures.images))
    chosen = np.sort(np.random.default_rng(0).choice(len(pictures.images), count, replace=False))
    figure = Figure(figsize=(2.6 * GRID_COLUMNS, 2.5 * GRID_ROWS), layout="constrained")
    figure.get_layout_engine().set(hspace=0.12)  # room for the predictions, which the layout does not count
    grid = figure.subplots(GRID_ROWS, GRID_COLUMNS).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, index in zip(grid, chosen, strict=False):
        axes.imshow(pictures.images[index])
        label = pictures.labels[index]
        axes.set_title(_shorten(pictures.names[label]), fontsize=10)
        for line, best in enumerate(np.argsort(-scores[index], kind="stable")[:3]):
            text = f"{line + 1}. {_shorten(pictures.names[best])}"
            axes.text(
                0.5,
                -0.06 - 0.11 * line,
                text,
                transform=axes.transAxes,
                ha="center",
                va="top",
                fontsize=9,
                color=RIGHT if best == label else WRONG,
                fontweight="bold" if best == label else "normal",
            )
    figure.suptitle("Pictures, their names, and the model's first three predictions (bold green: right)")
    return figure


def _shorten(name: str, length: int = 28) -> str:
    # A lone $ would switch matplotlib to mathematics.
    name = name.replace("$", r"\$")
    return name if len(name) <= length else name[: length - 1] + "…"


def write_report(workdir: epath.Path, evaluations: Evaluations, results: EvaluationResults) -> None:
    """Writes ``report/index.html`` and its pictures as PNG files beside it."""
    metrics = read_metrics(workdir)
    figures = {"loss": loss_figure(metrics)}
    if results.zero_shot:
        figures["accuracy"] = accuracy_figure(metrics, results)
        figures["predictions"] = predictions_figure(evaluations.zero_shot, results.scores)
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    sections = []
    for name, figure in figures.items():
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=100)
        (folder / f"{name}.png").write_bytes(stream.getvalue())
        encoded = base64.b64encode(stream.getvalue()).decode()
        sections.append(f'<img alt="{name}" src="data:image/png;base64,{encoded}">')
    page = _PAGE.format(title=html.escape(workdir.name), table=html.escape(results.table()), body="\n".join(sections))
    (folder / "index.html").write_text(page, encoding="utf-8")


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>clip_jax: {title}</title>
<style>
body {{ font-family: system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }}
img {{ max-width: 100%; display: block; margin: 1.5rem 0 }}
pre {{ background: #f6f8fa; padding: 1rem; overflow-x: auto }}
</style>
<h1>{title}</h1>
<p>Zero-shot: the model embeds a picture and every class's name, and answers with the most similar name; it was never
trained to classify. Retrieval: among all texts, how often the right one is within the first 1, 5 or 10 for a picture,
and the other way round.</p>
<pre>{table}</pre>
{body}
</html>
"""
