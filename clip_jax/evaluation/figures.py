"""Draws the plots and images of a report as HTML: SVG, PNG or JPEG in data: URIs."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from clip_jax.evaluation.metrics import calibration
from clip_jax.evaluation.robustness import logit, predicted_shift

IMAGE_SIDE = 160  # px
CRISP_SIDE = 64  # px; JPEG would show in smaller images
MAX_POINTS = 800  # of a curve; a plot has fewer pixels
PERCENT_TICKS = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5, 99.9)
BLUE, ORANGE, GRAY, GREEN = "#2563a8", "#d9730d", "#6e7781", "#1a7f37"
_STYLE = {
    "svg.hashsalt": "clip_jax",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e9ec",
    "axes.edgecolor": "#8c959f",
    "axes.axisbelow": True,
}


class Html(str):
    """A piece of HTML, which :func:`escaped` leaves unchanged."""

    __slots__ = ()


def escaped(text: object) -> Html:
    """Returns text as HTML. Returns :class:`Html` unchanged."""
    if isinstance(text, Html):
        return text
    # A lone surrogate, which JSON allows, cannot be written as UTF-8.
    return Html(html.escape(str(text)).encode("utf-8", "replace").decode())


def image_html(pixels: np.ndarray, alt: str) -> Html:
    """Returns an ``img`` of uint8 pixels ``[H, W, 3]``, scaled to at most ``IMAGE_SIDE``."""
    image = Image.fromarray(pixels)
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    stream = io.BytesIO()
    crisp = max(image.size) <= CRISP_SIDE
    image.save(stream, "PNG", optimize=True) if crisp else image.save(stream, "JPEG", quality=85)
    encoded = base64.b64encode(stream.getvalue()).decode()
    kind = "png" if crisp else "jpeg"
    size = f'width="{image.width}" height="{image.height}"'
    return Html(f'<img alt="{escaped(alt)}" {size} src="data:image/{kind};base64,{encoded}">')


def figure_html(figure: Figure, alt: str, caption: str = "") -> Html:
    """Returns a ``figure`` with the plot as SVG."""
    stream = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(stream.getvalue()).decode()
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Html(
        f'<figure><img class="plot" alt="{escaped(alt)}" width="{width}" height="{height}" '
        f'src="data:image/svg+xml;base64,{encoded}"><figcaption>{escaped(caption or alt)}</figcaption></figure>'
    )


def axes_of(width: float = 4.6, height: float = 3.2) -> tuple[Figure, Axes]:
    """Returns a figure with one plot; the size is in inches."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def curves_figure(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    levels: Mapping[str, tuple[str, float]] | None = None,
    **labels,
) -> Figure:
    """Draws lines over steps.

    Args:
      curves: steps and values by name.
      levels: by curve, the name and height of a dashed horizontal line in the color of the curve.
      **labels: arguments of :meth:`matplotlib.axes.Axes.set`.
    """
    figure, axes = axes_of()
    for (name, (steps, values)), color in zip(curves.items(), (BLUE, ORANGE, GREEN, GRAY), strict=False):
        every = -(-len(steps) // MAX_POINTS) or 1
        # From the end, so that the last point is always shown.
        steps, values = steps[::-1][::every], values[::-1][::every]
        axes.plot(steps, values, "o-" if len(steps) < 30 else "-", markersize=4, color=color, label=name)
        if levels and name in levels:
            what, height = levels[name]
            axes.axhline(height, color=color, linestyle="--", label=f"{name}, {what}")
    axes.set(xlabel="step", **labels)
    if len(curves) > 1 or levels:
        axes.legend(fontsize=9)
    return figure


def reliability_figure(confidence: np.ndarray, right: np.ndarray) -> Figure:
    """Draws the accuracy of answers over their probability.

    Args:
      confidence: the probability of each image's first answer, ``[M]``.
      right: whether it is right, bool ``[M]``.
    """
    figure, axes = axes_of(4.6, 4.2)
    _, stated, accuracy, counts = calibration(confidence, right)
    filled, bins = counts > 0, len(counts)
    stated, accuracy = 100 * stated[filled], 100 * accuracy[filled]
    centers = (np.arange(bins)[filled] + 0.5) * 100 / bins
    axes.bar(centers, accuracy, width=0.9 * 100 / bins, color="#c7dbf0", edgecolor=BLUE, linewidth=0.8)
    axes.plot([0, 100], [0, 100], "--", color=GRAY, linewidth=1)
    axes.scatter(stated, accuracy, s=12 + 150 * counts[filled] / counts.sum(), color=BLUE, zorder=3)
    axes.set(xlabel="stated probability, %", ylabel="right, %", xlim=(0, 100), ylim=(0, 103))
    return figure


def synthetic_shift_figure(original: float, accuracies: Mapping[str, Sequence[float]]) -> Figure:
    """Draws the main metric (shares, shown in per cent) over the strength of each corruption; 0 is the original."""
    figure, axes = axes_of(5.4, 3.4)
    colors = matplotlib.colormaps["tab10"].colors
    for index, (name, values) in enumerate(accuracies.items()):
        heights = [100 * value for value in (original, *values)]
        style = ("-", "--", ":")[index // len(colors) % 3]
        label = name.replace("_", " ").strip()
        axes.plot(range(len(heights)), heights, style, color=colors[index % 10], label=label, linewidth=1.4)
    axes.set(xlabel="strength", ylabel="accuracy, %", ylim=(0, None))
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def shift_figure(
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    here: tuple[float, float],
    line: tuple[float, float] | None,
    **labels,
) -> Figure:
    """Draws the accuracy under a shift over that on ImageNet, both on logit scales, with the line y = x.

    Args:
      groups: by name of a group of other models, their accuracies on ImageNet and under the shift, as shares.
      here: the two accuracies of this model, drawn as a star.
      line: slope and intercept of the standard models' line.
      **labels: arguments of :meth:`matplotlib.axes.Axes.set`.
    """
    figure, axes = axes_of(4.6, 4.4)
    for (name, (imagenet, shift)), color in zip(groups.items(), (GRAY, BLUE, GREEN), strict=False):
        if len(imagenet):
            axes.scatter(logit(imagenet), logit(shift), s=18, color=color, alpha=0.8, label=name)
    axes.scatter(*logit(here), marker="*", s=190, color=ORANGE, edgecolor="white", label="this model", zorder=4)
    everywhere = [
        logit([here[axis], *(value for group in groups.values() for value in group[axis])]) for axis in (0, 1)
    ]
    x_ticks, y_ticks = (_percent_ticks(values) for values in everywhere)
    bounds = np.array([logit(x_ticks[0] / 100), logit(x_ticks[-1] / 100)])
    axes.plot(bounds, bounds, ":", color=GRAY, linewidth=1, label="no loss (y = x)")
    if line:
        shares = 1 / (1 + np.exp(-np.linspace(*bounds, 50)))
        axes.plot(logit(shares), logit(predicted_shift(shares, line)), color=GRAY, linewidth=1, label="their line")
    for axis, ticks in (("x", x_ticks), ("y", y_ticks)):
        # Near 50 % a logit scale is so dense that the labels would overlap.
        step = -(-len(ticks) // 8)
        shown = ticks[::step] if ticks[-1] in ticks[::step] else (*ticks[::step], ticks[-1])
        getattr(axes, f"set_{axis}ticks")(logit(np.array(shown) / 100), [f"{tick:g}" for tick in shown])
        getattr(axes, f"set_{axis}lim")(*logit(np.array([ticks[0], ticks[-1]]) / 100))
    axes.set(**labels)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _percent_ticks(logits: np.ndarray) -> tuple[float, ...]:
    """Returns the round percentages around all values, and one more at either end."""
    ticks = logit(np.array(PERCENT_TICKS) / 100)
    first = max(int(np.searchsorted(ticks, logits.min(), "left")) - 1, 0)
    last = min(int(np.searchsorted(ticks, logits.max(), "right")), len(ticks) - 1)
    return PERCENT_TICKS[first : max(last, first + 1) + 1]
