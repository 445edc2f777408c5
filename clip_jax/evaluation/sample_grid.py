"""Draws images of an evaluation with the model's answers, as one image for TensorBoard and W&B."""

import unicodedata
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clip_jax.evaluation.results import TaskResult

COLUMNS, ROWS = 6, 3
SIDE, LINE = 112, 14  # px, of an image and of a line of text
FONT = ImageFont.load_default()
LONGEST = 200  # letters; more never fit below an image
RIGHT, WRONG, PLAIN = "#137333", "#c5221f", "#000000"

Cell = tuple[np.ndarray, list[tuple[str, str]]]


def draw_samples(task: TaskResult) -> np.ndarray | None:
    """Returns a grid of up to 18 images with the model's answers, uint8 ``[H, W, 3]``; None if there are no answers.

    Zero-shot classification: evenly spaced images, the most probable class in green or red, and the labeled class.
    Retrieval: the first texts of the report, each with the image that the model finds, framed in green or red.
    """
    cells = list(_retrieved(task) if task.kind == "retrieval" else _classified(task))
    if not cells or task.image_at is None:
        return None
    rows = -(-len(cells) // COLUMNS)
    grid = Image.new("RGB", (COLUMNS * (SIDE + 4), rows * (SIDE + 2 * LINE + 6)), "white")
    draw = ImageDraw.Draw(grid)
    for number, (pixels, lines) in enumerate(cells):
        row, column = divmod(number, COLUMNS)
        left, top = column * (SIDE + 4) + 2, row * (SIDE + 2 * LINE + 6) + 2
        grid.paste(Image.fromarray(pixels).resize((SIDE, SIDE)), (left, top))
        for line, (text, color) in enumerate(lines):
            draw.text((left, top + SIDE + 1 + line * LINE), text, fill=color, font=FONT)
        draw.rectangle((left - 1, top - 1, left + SIDE, top + SIDE), outline=lines[0][1])
    return np.asarray(grid)


def _classified(task: TaskResult) -> Iterator[Cell]:
    best, labels = task.arrays.get("best"), task.arrays.get("labels")
    if best is None or not len(best) or task.image_at is None:
        return
    for index in np.unique(np.linspace(0, len(best) - 1, COLUMNS * ROWS).astype(int)).tolist():
        answer = int(best[index, 0])
        if labels is None:  # images with several labels
            lines = [(text, PLAIN) for text in _below(task.class_names[answer], 2)]
        else:
            is_right = answer == labels[index]
            color = RIGHT if is_right else WRONG
            lines = [(text, color) for text in _below(task.class_names[answer], 2 if is_right else 1)]
            if not is_right:
                lines += [(text, PLAIN) for text in _below(f"({task.class_names[int(labels[index])]})", 1)]
        yield task.image_at(index), lines


def _retrieved(task: TaskResult) -> Iterator[Cell]:
    found, right = task.arrays.get("best_images"), task.arrays.get("right_images")
    if found is None or right is None or task.image_at is None:
        return
    for text, images, is_right in list(zip(task.texts, found, right, strict=True))[: COLUMNS * ROWS]:
        color = RIGHT if is_right[0] else WRONG
        yield task.image_at(int(images[0])), [(line, color) for line in _below(text, 2)]


def _below(text: str, count: int) -> list[str]:
    """Returns one to ``count`` lines as wide as an image; the last one ends with "…" if the text is longer.

    Letters lose their accents, which the font lacks.
    """
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    rest, lines = " ".join(plain.split())[:LONGEST], []
    while FONT.getlength(rest) > SIDE:
        is_last = len(lines) == count - 1
        mark = "…" if is_last else ""
        end = max(end for end in range(len(rest)) if FONT.getlength(rest[:end] + mark) <= SIDE)
        if is_last:
            return [*lines, rest[:end].rstrip() + mark]
        end = max(rest.rfind(" ", 0, end + 1), 0) or end  # a word longer than a line is cut
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return [*lines, rest]
