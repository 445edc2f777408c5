"""The grid of an evaluation's images shows what the model answered, right or wrong."""

import numpy as np
import pytest
from PIL import ImageColor

from clip_jax.evaluation.results import TaskResult
from clip_jax.evaluation.sample_grid import FONT, LINE, RIGHT, SIDE, WRONG, _below, draw_samples

COLORS = [(255, 0, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]


def image_at(index: int) -> np.ndarray:
    return np.full((8, 8, 3), COLORS[index % 4], np.uint8)


def task_of(kind: str, images: int = 4, **fields) -> TaskResult:
    names = ["red", "blue", "yellow", "a class with a very long name"]
    return TaskResult("task", "Task", kind, "top_1", {}, {"images": images}, class_names=names, **fields)


def frames(grid: np.ndarray, count: int) -> list[str]:
    """The colors of the frames of the first images."""
    rows = [
        (grid[1 + number // 6 * (SIDE + 2 * LINE + 6), 10 + number % 6 * (SIDE + 4)]).tolist()
        for number in range(count)
    ]
    known = {ImageColor.getrgb(color): name for color, name in ((RIGHT, "right"), (WRONG, "wrong"))}
    return [known.get(tuple(row), "?") for row in rows]


def test_answers_of_a_classification_are_right_or_wrong():
    arrays = {"labels": np.int32([0, 1, 2, 3]), "best": np.int32([[0, 1], [2, 1], [2, 0], [0, 3]])}
    grid = draw_samples(task_of("zero_shot", arrays=arrays, image_at=image_at))
    assert grid.dtype == np.uint8 and grid.shape == (SIDE + 2 * LINE + 6, 6 * (SIDE + 4), 3)
    assert frames(grid, 4) == ["right", "wrong", "right", "wrong"]
    for number, color in enumerate(COLORS):
        assert grid[SIDE // 2, SIDE // 2 + number * (SIDE + 4)].tolist() == list(color)


def test_many_images_are_evenly_spaced():
    shown = []
    arrays = {"labels": np.zeros(1_000, np.int32), "best": np.zeros((1_000, 1), np.int32)}
    draw_samples(
        task_of("zero_shot", 1_000, arrays=arrays, image_at=lambda index: (shown.append(index), image_at(0))[1])
    )
    assert len(shown) == 18 and shown[0] == 0 and shown[-1] == 999
    assert np.ptp(np.diff(shown)) <= 1


def test_images_with_several_labels_have_no_verdict():
    grid = draw_samples(task_of("zero_shot", arrays={"best": np.int32([[0]])}, image_at=image_at))
    assert frames(grid, 1) == ["?"]


def test_retrieval_shows_the_image_that_a_text_finds():
    arrays = {"best_images": np.int32([[1, 0], [3, 2]]), "right_images": np.array([[True, False], [False, True]])}
    grid = draw_samples(task_of("retrieval", arrays=arrays, texts=["blue", "yellow " * 9], image_at=image_at))
    assert frames(grid, 2) == ["right", "wrong"]
    assert grid[SIDE // 2, SIDE // 2].tolist() == list(COLORS[1])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "text", ["a photo of a golden retriever in snow", "W" * 60, "i" * 300, "a " + "x" * 90, "first\nsecond line " * 3]
)
def test_lines_are_as_wide_as_an_image_and_keep_each_letter_until_they_end(text, count):
    lines = _below(text, count)
    assert len(lines) == count and all(0 < FONT.getlength(line) <= SIDE for line in lines)
    shown = "".join(lines).replace(" ", "")
    assert "".join(text.split()).startswith(shown.removesuffix("…"))
    assert shown.endswith("…") or shown == "".join(text.split())


def test_a_text_that_fits_is_one_line():
    assert _below("a dog", 2) == ["a dog"]
    assert _below("", 2) == [""]
    assert _below("two\n lines", 2) == ["two lines"]
    assert _below("a golden retriever in the snow", 2) == ["a golden retriever in", "the snow"]


def test_accents_are_left_out():
    assert _below("Jalapeño à l'été", 1) == ["Jalapeno a l'ete"]


def test_no_images_have_no_grid():
    arrays = {"labels": np.zeros(0, np.int32), "best": np.zeros((0, 4), np.int32)}
    assert draw_samples(task_of("zero_shot", 0, arrays=arrays, image_at=image_at)) is None


@pytest.mark.parametrize("kind", ["zero_shot", "retrieval"])
def test_without_answers_there_is_no_grid(kind):
    assert draw_samples(task_of(kind, image_at=image_at)) is None
