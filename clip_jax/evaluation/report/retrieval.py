"""Writes the report section of a retrieval task: recalls, and texts with their closest images."""

from clip_jax.evaluation.figures import Html, escaped, image_html
from clip_jax.evaluation.report.page import DIRECTIONS, join, notes, percent, table
from clip_jax.evaluation.report.published import published_table
from clip_jax.evaluation.results import TaskResult
from clip_jax.evaluation.retrieval import RECALL_AT

SHOWN_QUERIES = 12


def retrieval_section(task: TaskResult, published: dict) -> Html:
    """Returns recalls with chance, other models' numbers, and texts with their closest images."""
    depths = [k for k in RECALL_AT if any(f"{direction}_recall@{k}" in task.metrics for direction in DIRECTIONS)]
    rows = []
    for direction, name in DIRECTIONS.items():
        for who, values in (("", task.metrics), (", chance", task.chance)):
            recalls = [values.get(f"{direction}_recall@{k}") for k in depths]
            if any(recall is not None for recall in recalls):
                rows.append([name + who, *map(percent, recalls)])
    low = [f"{DIRECTIONS[direction]} @{k}" for direction in DIRECTIONS for k in depths
           if task.not_above(f"{direction}_recall@{k}")]  # fmt: skip
    return join(
        f"<p>{task.counts.get('images', 0):,} images, {task.counts.get('texts', 0):,} texts.</p>",
        table(["recall, %", *(f"@{k}" for k in depths)], rows),
        f'<p class="low">Not above chance: {escaped(", ".join(low))}.</p>' if low else "",
        published_table(task, published),
        notes(task),
        _queries(task),
    )


def _queries(task: TaskResult) -> Html:
    best, right = task.arrays.get("best_images"), task.arrays.get("right_images")
    if task.image_at is None or best is None or right is None or not len(best):
        return Html("")
    pieces = ["<h3>Texts and their closest images</h3><p>Images that belong to the text are marked ✓.</p>"]
    for text, images, marks in list(zip(task.texts, best, right, strict=False))[:SHOWN_QUERIES]:
        figures = []
        for rank, (image, mark) in enumerate(zip(images.tolist(), marks.tolist(), strict=True), 1):
            kind, label = ("right", f"✓ {rank}") if mark else ("wrong", f"{rank}")
            html = image_html(task.image_at(image), f"image {image}, rank {rank}{', right' if mark else ''}")
            figures.append(f'<figure class="{kind}">{html}<figcaption>{label}</figcaption></figure>')
        pieces.append(f'<div class="query"><p>{escaped(text)}</p><div class="row">{"".join(figures)}</div></div>')
    return join(*pieces)
