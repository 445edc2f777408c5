"""What the report shows: plots as SVG and pictures as PNG or JPEG, each within the page as a data: URI."""

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

PICTURE_SIDE = 160  # px
CRISP_SIDE = 64  # px; smaller pictures are drawings or nearly so, where JPEG would show
MOST_POINTS = 800  # of a curve: more than a plot has pixels
PERCENT_TICKS = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5, 99.9)
BLUE, ORANGE, GREY, GREEN = "#2563a8", "#d9730d", "#6e7781", "#1a7f37"
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
    """A piece of a page: nothing in it is to be escaped again."""

    __slots__ = ()


def escaped(text: object) -> Html:
    """Text as HTML; what is HTML already stays as it is."""
    if isinstance(text, Html):
        return text
    # Half a character, which JSON can hold, could not be written.
    return Html(html.escape(str(text)).encode("utf-8", "replace").decode())


def picture_html(pixels: np.ndarray, alt: str) -> Html:
    """An ``img`` of uint8 pixels ``[H, W, 3]``, scaled to at most ``PICTURE_SIDE``."""
    image = Image.fromarray(pixels)
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    stream = io.BytesIO()
    crisp = max(image.size) <= CRISP_SIDE
    image.save(stream, "PNG", optimize=True) if crisp else image.save(stream, "JPEG", quality=85)
    encoded = base64.b64encode(stream.getvalue()).decode()
    kind = "png" if crisp else "jpeg"
    size = f'width="{image.width}" height="{image.height}"'
    return Html(f'<img alt="{escaped(alt)}" {size} src="data:image/{kind};base64,{encoded}">')


def figure_html(figure: Figure, alt: str, caption: str = "") -> Html:
    """A ``figure`` with the plot as SVG."""
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
    """A figure with one plot, in inches."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def curves_figure(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    levels: Mapping[str, tuple[str, float]] | None = None,
    **labels,
) -> Figure:
    """Lines over steps.

    Args:
      curves: steps and values by name.
      levels: by the name of a curve, the name and the height of a dashed horizontal line in its color.
      **labels: of the axes, as :meth:`matplotlib.axes.Axes.set` takes them.
    """
    figure, axes = axes_of()
    for (name, (steps, values)), colour in zip(curves.items(), (BLUE, ORANGE, GREEN, GREY), strict=False):
        every = -(-len(steps) // MOST_POINTS) or 1
        # From the end, so that the last point is always one of those shown.
        steps, values = steps[::-1][::every], values[::-1][::every]
        axes.plot(steps, values, "o-" if len(steps) < 30 else "-", markersize=4, color=colour, label=name)
        if levels and name in levels:
            what, height = levels[name]
            axes.axhline(height, color=colour, linestyle="--", label=f"{name}, {what}")
    axes.set(xlabel="step", **labels)
    if len(curves) > 1 or levels:
        axes.legend(fontsize=9)
    return figure


def reliability_figure(confidence: np.ndarray, right: np.ndarray) -> Figure:
    """How often answers of a probability are right.

    Args:
      confidence: the probability of each picture's first answer, ``[M]``.
      right: whether it is right, bool ``[M]``.
    """
    figure, axes = axes_of(4.6, 4.2)
    _, stated, accuracy, counts = calibration(confidence, right)
    filled, bins = counts > 0, len(counts)
    stated, accuracy = 100 * stated[filled], 100 * accuracy[filled]
    centres = (np.arange(bins)[filled] + 0.5) * 100 / bins
    axes.bar(centres, accuracy, width=0.9 * 100 / bins, color="#c7dbf0", edgecolor=BLUE, linewidth=0.8)
    axes.plot([0, 100], [0, 100], "--", color=GREY, linewidth=1)
    axes.scatter(stated, accuracy, s=12 + 150 * counts[filled] / counts.sum(), color=BLUE, zorder=3)
    axes.set(xlabel="stated probability, %", ylabel="right, %", xlim=(0, 100), ylim=(0, 103))
    return figure


def synthetic_shift_figure(untouched: float, accuracies: Mapping[str, Sequence[float]]) -> Figure:
    """The main metric (shares in, per cent shown) over the strength of each corruption; 0 is the untouched picture."""
    figure, axes = axes_of(5.4, 3.4)
    colours = matplotlib.colormaps["tab10"].colors
    for index, (name, values) in enumerate(accuracies.items()):
        heights = [100 * value for value in (untouched, *values)]
        style = ("-", "--", ":")[index // len(colours) % 3]
        label = name.replace("_", " ").strip()
        axes.plot(range(len(heights)), heights, style, color=colours[index % 10], label=label, linewidth=1.4)
    axes.set(xlabel="strength", ylabel="accuracy, %", ylim=(0, None))
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def shift_figure(
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    here: tuple[float, float],
    line: tuple[float, float] | None,
    **labels,
) -> Figure:
    """Accuracy under a shift against that on ImageNet, both on logit scales, with the line y = x.

    Args:
      groups: accuracies on ImageNet and under the shift, shares, of groups of other models.
      here: the same two of this model, drawn as a star.
      line: slope and intercept of the standard models' line.
      **labels: of the axes, as :meth:`matplotlib.axes.Axes.set` takes them.
    """
    figure, axes = axes_of(4.6, 4.4)
    for (name, (imagenet, shift)), colour in zip(groups.items(), (GREY, BLUE, GREEN), strict=False):
        if len(imagenet):
            axes.scatter(logit(imagenet), logit(shift), s=18, color=colour, alpha=0.8, label=name)
    axes.scatter(*logit(here), marker="*", s=190, color=ORANGE, edgecolor="white", label="this model", zorder=4)
    everywhere = [
        logit([here[axis], *(value for group in groups.values() for value in group[axis])]) for axis in (0, 1)
    ]
    x_ticks, y_ticks = (_percent_ticks(values) for values in everywhere)
    bounds = np.array([logit(x_ticks[0] / 100), logit(x_ticks[-1] / 100)])
    axes.plot(bounds, bounds, ":", color=GREY, linewidth=1, label="no loss (y = x)")
    if line:
        shares = 1 / (1 + np.exp(-np.linspace(*bounds, 50)))
        axes.plot(logit(shares), logit(predicted_shift(shares, line)), color=GREY, linewidth=1, label="their line")
    for axis, ticks in (("x", x_ticks), ("y", y_ticks)):
        # Near 50 % a logit scale is so dense that all ticks would touch.
        step = -(-len(ticks) // 8)
        shown = ticks[::step] if ticks[-1] in ticks[::step] else (*ticks[::step], ticks[-1])
        getattr(axes, f"set_{axis}ticks")(logit(np.array(shown) / 100), [f"{tick:g}" for tick in shown])
        getattr(axes, f"set_{axis}lim")(*logit(np.array([ticks[0], ticks[-1]]) / 100))
    axes.set(**labels)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _percent_ticks(logits: np.ndarray) -> tuple[float, ...]:
    """The round percentages around all values, one beyond them at either end."""
    ticks = logit(np.array(PERCENT_TICKS) / 100)
    first = max(int(np.searchsorted(ticks, logits.min(), "left")) - 1, 0)
    last = min(int(np.searchsorted(ticks, logits.max(), "right")), len(ticks) - 1)
    return PERCENT_TICKS[first : max(last, first + 1) + 1]
