"""Each augmentation has the expected effect on images with known pixels."""

import math

import numpy as np
import pytest
from drawings import EACH_ALONE, drawing, noise
from PIL import Image, ImageOps

from clip_jax.data import augmentation
from clip_jax.data.augmentation import Augmentation, augment, change_colors, change_shape, draw_outlines


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("strengths", EACH_ALONE, ids=lambda it: next(k for k, v in vars(it).items() if v))
def test_each_augmentation_changes_the_image_and_not_its_input(strengths):
    image = drawing()
    before = image.tobytes()
    rng = generator()
    assert any(augment(image, rng, strengths).tobytes() != before for _ in range(5))
    assert image.tobytes() == before


@pytest.mark.parametrize("name", ["flip", "grayscale", "outline", "line_drawing", "erasing"])
def test_probabilities_are_exact(name):
    image, rng = drawing(), generator()
    changed = sum(augment(image, rng, Augmentation(**{name: 0.3})).tobytes() != image.tobytes() for _ in range(1000))
    assert abs(changed - 300) < 5 * math.sqrt(1000 * 0.3 * 0.7)


def test_a_certain_flip_mirrors():
    image = noise(16, 16)
    assert augment(image, generator(), Augmentation(flip=1.0)) == ImageOps.mirror(image)


def test_a_shape_of_zero_strength_changes_nothing():
    image = noise(48, 48)
    assert change_shape(image, generator(), Augmentation()) == image


def test_translation_moves_at_most_by_its_bound_and_fills_in_white():
    dot = Image.new("RGB", (64, 64), "white")
    dot.putpixel((32, 32), (0, 0, 0))
    rng, reached = generator(), 0.0
    for _ in range(300):
        rows, columns = np.nonzero(255 - np.asarray(augment(dot, rng, Augmentation(translation=0.25)))[..., 0])
        offset = max(abs(rows - 32).max(), abs(columns - 32).max())
        reached = max(reached, offset)
    assert 14 <= reached <= 17
    black = Image.new("RGB", (64, 64))
    moved = np.asarray(augment(black, generator(), Augmentation(translation=0.25)))
    assert set(np.unique(moved)) == {0, 255}


def test_zoom_enlarges_and_reduces_within_its_bounds():
    rng = generator()
    areas = [
        (np.asarray(augment(drawing(64), rng, Augmentation(zoom=0.5)))[..., 1] < 128).sum() / 16**2 for _ in range(300)
    ]
    assert 1 / 1.5**2 * 0.85 < min(areas) < 0.6 and 1.8 < max(areas) < 1.5**2 * 1.15


def test_rotation_turns_at_most_by_its_bound():
    line = Image.new("RGB", (65, 65), "white")
    line.paste((0, 0, 0), (40, 32, 60, 33))
    rng, angles = generator(), []
    for _ in range(300):
        rows, columns = np.nonzero(np.asarray(augment(line, rng, Augmentation(rotation=20)))[..., 0] < 128)
        angles.append(math.degrees(math.atan2((rows - 32).mean(), (columns - 32).mean())))
    assert -22 < min(angles) < -15 and 15 < max(angles) < 22


def test_hue_and_saturation_change_colors_but_not_grays():
    rng = generator()
    for _ in range(20):
        change = Augmentation(hue=180, saturation=1.0)
        for level in (0, 100, 255):
            pixel = change_colors(Image.new("RGB", (1, 1), (level,) * 3), rng, change).getpixel((0, 0))
            np.testing.assert_allclose(pixel, level, atol=1)


def test_a_hue_of_120_degrees_permutes_the_channels():
    rotated = np.array((10.0, 60.0, 200.0)) @ augmentation._hue_rotation(120).T
    np.testing.assert_allclose(rotated, (200, 10, 60), atol=1e-9)


def test_grayscale_weights_channels_like_pillow():
    image = noise(16, 16)
    gray = np.asarray(augment(image, generator(), Augmentation(grayscale=1.0))).astype(int)
    np.testing.assert_allclose(gray, np.asarray(image.convert("L").convert("RGB")), atol=1)


def test_tint_colors_white_and_keeps_black():
    tinted = augment(Image.new("RGB", (2, 2), "white"), generator(), Augmentation(tint=0.5)).getpixel((0, 0))
    assert len(set(tinted)) == 3 and min(tinted) >= 127
    assert augment(Image.new("RGB", (2, 2)), generator(), Augmentation(tint=0.5)).getpixel((0, 0)) == (0, 0, 0)


def test_outlines_are_black_only_where_colors_meet():
    image = drawing()
    lines = np.asarray(draw_outlines(image, Image.new("RGB", image.size, "white")))
    expected = np.full((32, 32), 255)
    expected[8, 8:16] = expected[16, 8:16] = expected[8:16, 8] = expected[8:16, 16] = 0
    np.testing.assert_array_equal(lines[..., 0], expected)
    outlined = np.asarray(draw_outlines(image, image))
    np.testing.assert_array_equal(outlined, np.where(expected[..., None] == 0, 0, np.asarray(image)))


def test_soft_shading_draws_no_outline():
    shading = Image.fromarray(np.arange(0, 240, 8, np.uint8)[None, :, None].repeat(30, 0).repeat(3, 2))
    assert draw_outlines(shading, shading) == shading


def test_erasing_covers_one_rectangle_of_one_color():
    image = Image.new("RGB", (40, 40), "white")
    rng = generator()
    for _ in range(50):
        erased = np.asarray(augment(image, rng, Augmentation(erasing=1.0)))
        rows, columns = np.nonzero((erased != 255).any(axis=-1))
        box = erased[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box == box[0, 0]).all() and 4 <= box.shape[0] <= 20 and 5 <= box.shape[1] <= 20
