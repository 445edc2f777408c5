"""Builds an HTML page: its style, tables and percentages, and the names of metrics."""

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from clip_jax.evaluation.figures import Html, escaped
from clip_jax.evaluation.results import TaskResult

DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}
SHORT = {
    "top_1": "top-1",
    "top_5": "top-5",
    "mean_per_class": "mean per class",
    "mean_top_1_top_5": "mean of top-1 and top-5",
    "calibration_error": "calibration error",
    "average_precision_11": "11-point average precision",
    "roc_auc": "ROC AUC",
    "largest_class": "largest class",
    "baseline": "nearest mean image",
    "not_above": "not above",
}
# Names of weight files that are shown with their folder.
PLAIN_STEMS = ("model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")


def title_of(model: str) -> str:
    """Returns the name of a run or a file of weights, without its path."""
    path = pathlib.PurePath(model) if "://" in model else pathlib.Path(model).expanduser()
    name = path.name or pathlib.Path(path).resolve().name or model
    return f"{path.parent.name}/{name}" if path.stem in PLAIN_STEMS and path.parent.name else name


def metric_name(metric: str) -> str:
    """Returns the name of a metric that the report shows."""
    direction, _, recall = metric.rpartition("_")
    return f"{DIRECTIONS[direction]}, {recall}" if direction in DIRECTIONS else SHORT.get(metric, metric)


def percent(share: float | None, sign: bool = False) -> str:
    """Returns a share in per cent, with two decimals below 1 %; a dash for None and values that are not finite."""
    if share is None or not np.isfinite(share):
        return "–"
    decimals = 2 if 0 < abs(share) < 0.01 else 1
    return f"{100 * share:{'+' if sign else ''}.{decimals}f}"


def marked(share: float | None, not_above: Sequence[str]) -> Html:
    """Returns a share in per cent, and below it the references that it does not exceed."""
    mark = f' <span class="low">not above {escaped(", ".join(not_above))}</span>' if not_above else ""
    return Html(f"<div><b>{percent(share)}</b>{mark}</div>")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1, stack: bool = False) -> Html:
    """Returns a table with ``texts`` columns of text, then columns of numbers.

    On a narrow screen it scrolls. With ``stack``, each row becomes a block of lines instead, so nothing is cut off.
    """

    def cell(tag: str, column: int, value: object) -> str:
        number = "" if column < texts else ' class="number"'
        name = f' data-head="{escaped(head[column])}"' if stack and tag == "td" and column else ""
        return f"<{tag}{number}{name}>{escaped(value)}</{tag}>"

    def row(tag: str, cells: Sequence[object]) -> str:
        return "".join(cell(tag, column, value) for column, value in enumerate(cells))

    lines = "\n".join(f"<tr>{row('td', cells)}</tr>" for cells in rows)
    kind = ' class="stack"' if stack else ""
    return Html(f'<div class="scroll"><table{kind}><thead><tr>{row("th", head)}</tr></thead>\n{lines}</table></div>')


def notes(task: TaskResult) -> Html:
    """Returns the notes of a task, one paragraph for each."""
    return join(*(f"<p>Note: {escaped(note)}.</p>" for note in task.notes))


def join(*pieces: str) -> Html:
    """Joins the pieces that are not empty, one on each line."""
    return Html("\n".join(piece for piece in pieces if piece))


def page(title: str, body: Sequence[str]) -> str:
    """Returns the whole page around the pieces of HTML in ``body``."""
    return _PAGE.format(title=escaped(title), body=join(*body))


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --quiet: #57606a; --card: #f6f8fa; --line: #d8dee4; --right: #1a7f37;
  --low: #a8430a; --shadow: #0003 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --quiet: #9aa4af; --card: #20262d; --line: #3a424b; --right: #4ac26b;
    --low: #f0a35e; --shadow: #fff4 }}
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
/* A shadow where a table continues: covers that move with the table are above shadows that do not move. */
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
.low {{ display: block; color: var(--low); font-weight: 400; font-size: 14px; white-space: normal; min-width: 8rem }}
code, pre {{ font-family: ui-monospace, monospace; font-size: 14px; overflow-wrap: anywhere; white-space: pre-wrap }}
@media (max-width: 40rem) {{
  th, td {{ padding: 0.35rem 0.5rem }}
  .stack thead {{ display: none }}
  .stack, .stack tbody, .stack tr {{ display: block }}
  .stack tr {{ border-bottom: 1px solid var(--line); padding: 0.5rem 0 }}
  .stack td {{ display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: 0.1rem 0; max-width: none;
    text-align: right }}
  .stack td:first-child {{ display: block; text-align: left; font-weight: 600 }}
  .stack td::before {{ content: attr(data-head); color: var(--quiet); font-size: 14px; text-align: left;
    flex: 0 0 auto; max-width: 50% }}
  .stack td:first-child::before {{ content: none }}
}}
details {{ margin: 0.6rem 0 }}
summary {{ cursor: pointer }}
figure {{ margin: 0 }}
img {{ display: block; background: #fff; border-radius: 4px }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.5rem;
  margin: 1rem 0; align-items: start }}
.plot {{ width: 100%; max-width: 34rem; height: auto }}
.plots figcaption {{ font-size: 14px; color: var(--quiet); margin-top: 0.3rem; overflow-wrap: anywhere }}
.images {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.8rem }}
.images figure {{ background: var(--card); border-radius: 6px; padding: 0.6rem; font-size: 14px; line-height: 1.35 }}
.images img {{ width: 100%; max-width: 10rem; height: auto; margin: 0 auto 0.5rem }}
.images.wide {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)) }}
@media (max-width: 40rem) {{
  .images.wide {{ grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)) }}
}}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: 0.5rem }}
figcaption.pair ol {{ margin: 0 }}
.pair p {{ margin: 0; font-size: 14px; color: var(--quiet) }}
.images b {{ overflow-wrap: anywhere }}
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
