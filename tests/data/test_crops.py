"""Resizing and cropping for evaluation and training equal Pillow's and torchvision's."""

import dataclasses
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from drawings import EACH_ALONE, PAPER, STRONG, drawing, encoded, generator, noise, photograph, training_pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from clip_jax.data import images
from clip_jax.data.augmentation import Augmentation, augment
from clip_jax.data.images import (
    ImageError,
    decode_pixels,
    evaluation_transform,
    training_transform,
)
from clip_jax.models.preprocessing import Preprocessing


@pytest.mark.parametrize("size", [(64, 64), (100, 64), (64, 101), (31, 17), (7, 300), (225, 224), (224, 224)])
@pytest.mark.parametrize("image_size", [32, 48, 224])
def test_evaluation_equals_pillows_bicubic_resize_and_a_central_crop(size, image_size):
    image, (width, height) = noise(*size), size
    if width <= height:
        resized = image.resize((image_size, int(image_size * height / width)), Image.Resampling.BICUBIC)
    else:
        resized = image.resize((int(image_size * width / height), image_size), Image.Resampling.BICUBIC)
    left = round((resized.width - image_size) / 2.0)
    top = round((resized.height - image_size) / 2.0)
    expected = np.asarray(resized)[top : top + image_size, left : left + image_size]
    actual = evaluation_transform(image, image_size)
    assert actual.dtype == np.uint8 and actual.shape == (image_size, image_size, 3)
    np.testing.assert_array_equal(actual, expected)


def test_the_crops_position_is_rounded_half_to_even_as_by_torchvision():
    for extra, left in ((1, 0), (3, 2), (5, 2), (7, 4)):
        image = noise(16 + extra, 16)
        np.testing.assert_array_equal(evaluation_transform(image, 16), np.asarray(image)[:, left : left + 16])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
@pytest.mark.parametrize("shape", [(40, 40), (90, 30), (21, 50), (20, 18)])
@pytest.mark.parametrize(
    ("mode", "resize_size"), [("squash", 0), ("squash", 20), ("longest", 0), ("longest", 12), ("shortest", 24)]
)
def test_training_resizes_as_evaluation_does_and_crops_at_random(mode, resize_size, shape, interpolation):
    """Every training crop is part of the image that evaluation resizes."""
    way = Preprocessing(resize_mode=mode, resize_size=resize_size, interpolation=interpolation, fill_color=77)
    image, rng = (
        ImageOps.autocontrast(noise(*shape).resize((5, 4)).resize(shape, Image.Resampling.BICUBIC)),
        generator(),
    )
    size = max(images._resized_size(shape, 16, way))
    whole = evaluation_transform(image, max(16, size), dataclasses.replace(way, resize_size=resize_size or 16))
    seen = set()
    for _ in range(12):
        crop = training_transform(image, 16, rng, PAPER, preprocessing=way)
        assert crop.shape == (16, 16, 3)
        differences = {
            (top, left): np.abs(np.int16(whole[top : top + 16, left : left + 16]) - crop).mean()
            for top in range(len(whole) - 15)
            for left in range(len(whole) - 15)
        }
        position = min(differences, key=differences.get)
        assert differences[position] < (8 if interpolation == "nearest" else 1.5)
        seen.add(position)
    assert (len(seen) > 1) == (size > 16)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_random_resized_crop_uses_the_given_interpolation(interpolation):
    image, way = noise(60, 50), Preprocessing(interpolation=interpolation, resize_mode="squash")
    whole = Augmentation(crop_scale=1.0)
    crop = training_transform(image, 16, generator(), whole, preprocessing=way)
    box = images._random_resized_crop(60, 50, generator(), 1.0)
    expected = image.resize((16, 16), Image.Resampling[interpolation.upper()], box)
    assert np.abs(np.int16(np.asarray(expected)) - crop).mean() < 1


def test_without_augmentation_training_is_the_papers_random_crop_at_every_position():
    image = noise(20, 16)
    pixels = np.asarray(image)
    crops = {pixels[:, left : left + 16].tobytes(): left for left in range(5)}
    rng = generator()
    seen = {crops[training_transform(image, 16, rng, Augmentation()).tobytes()] for _ in range(200)}
    assert seen == set(range(5))


def difference(pixels: np.ndarray, others: np.ndarray) -> tuple[float, int]:
    """Returns the mean and the largest difference, in levels."""
    levels = np.abs(pixels.astype(int) - others.astype(int))
    return levels.mean(), levels.max()


def resized_and_cropped_by_pillow(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    short = min(image.size)
    image = image.resize([int(size * side / short) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (int(rng.integers(side - size + 1)) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("size", [(256, 256), (640, 480), (333, 500), (100, 90), (300, 40), (1999, 1501)])
@pytest.mark.parametrize("resizer", ["cykooz_resizer", "Pillow"])
def test_resizing_only_the_crop_equals_pillows_resizing_before_the_crop(size, resizer, monkeypatch):
    if resizer == "Pillow":
        monkeypatch.setattr(images, "cykooz_resizer", None)
    elif images.cykooz_resizer is None:
        pytest.skip("no cykooz.resizer here")
    image = photograph(*size)
    for seed in range(3):
        rng, same = generator(seed), generator(seed)
        pixels = training_transform(image, 224, rng, PAPER)
        mean, largest = difference(pixels, resized_and_cropped_by_pillow(image, 224, same))
        assert mean <= 0.3 and largest <= 15
        np.testing.assert_array_equal(pixels, training_transform(np.asarray(image), 224, generator(seed), PAPER))
        augment(image, same, PAPER)
        assert rng.random() == same.random()


@pytest.mark.parametrize("size", [(48, 48), (101, 48), (48, 77)])
def test_an_image_of_the_final_size_keeps_its_pixels(size):
    image = noise(*size)
    pixels = resized_and_cropped_by_pillow(image, 48, generator())
    np.testing.assert_array_equal(training_transform(image, 48, generator(), PAPER), pixels)
    np.testing.assert_array_equal(training_pixels(encoded(image), 48, generator(), PAPER), pixels)


@pytest.mark.parametrize("size", [(2304, 1728), (1203, 803), (777, 1999)])
@pytest.mark.parametrize("crop_scale", [0.0, 0.9, 0.3])
@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 95, "subsampling": 0}])
def test_a_large_jpeg_decoded_at_a_lower_resolution_gives_nearly_the_same_crop(size, crop_scale, options):
    data, augmentation = encoded(photograph(*size), "JPEG", **options), Augmentation(crop_scale=crop_scale)
    whole = decode_pixels(data)
    assert whole.shape == (*size[::-1], 3)
    for seed in range(3):
        fast = training_pixels(data, 96, generator(seed), augmentation)
        mean, largest = difference(fast, training_transform(whole, 96, generator(seed), augmentation))
        assert mean <= 1 and largest <= 20
        # Reduced from twice 2.5 x 96 pixels on, in a crop of half the short side or more.
        assert (mean > 0) == (min(size) >= 480 / (0.475 if crop_scale == 0.3 else 1))


def test_an_image_that_is_not_a_jpeg_is_decoded_at_full_resolution():
    image = photograph(800, 700)
    np.testing.assert_array_equal(
        training_pixels(encoded(image), 64, generator(), STRONG), training_transform(image, 64, generator(), STRONG)
    )


def test_a_bad_image_draws_no_random_number():
    rng = generator()
    with pytest.raises(ImageError):
        training_pixels(encoded(noise(30, 9)), 8, rng, STRONG, min_side=10)
    with pytest.raises(ImageError):
        training_pixels(encoded(noise(90, 9)), 8, rng, STRONG, max_aspect_ratio=9)
    assert rng.random() == generator().random()


def test_threads_do_not_disturb_each_other():
    image = photograph(200, 150)
    expected = [training_transform(image, 64, generator(seed), PAPER) for seed in range(40)]
    with ThreadPoolExecutor(4) as threads:
        actual = threads.map(lambda seed: training_transform(image, 64, generator(seed), PAPER), range(40))
        np.testing.assert_array_equal(list(actual), expected)


@settings(max_examples=200, deadline=None)
@given(st.tuples(st.integers(1, 400), st.integers(1, 400)), st.integers(1, 100), st.sampled_from([0.0, 0.01, 0.9, 1.0]))
def test_every_crop_is_inside_the_image(size, image_size, crop_scale):
    pixels = np.full((*size, 3), 77, np.uint8)
    cropped = training_transform(pixels, image_size, generator(), Augmentation(crop_scale=crop_scale))
    assert cropped.shape == (image_size, image_size, 3) and (cropped == 77).all()


def test_random_resized_crops_have_torchvisions_areas_ratios_and_positions():
    least, side, rng = 0.5, 2_000, generator()
    boxes = np.array([images._random_resized_crop(side, side, rng, least) for _ in range(4_000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, ratios = widths * heights / side**2, widths / heights
    assert boxes.min() >= 0 and boxes.max() <= side and areas.min() >= least - 1e-3
    assert ratios.min() >= 0.75 - 1e-3 and ratios.max() <= 4 / 3 + 1e-3
    # Area and log ratio are drawn uniformly, and drawn again if the crop exceeds the image: |log ratio| > -log area.
    # So the density of an area is proportional to min(log 4/3, -log area).
    grid = np.linspace(least, 1, 10_001)[:-1]
    density = np.minimum(math.log(4 / 3), -np.log(grid))
    mean = (grid * density).sum() / density.sum()
    assert abs(areas.mean() - mean) < 5 * areas.std() / math.sqrt(len(areas))
    assert abs(np.log(ratios).mean()) < 5 * np.log(ratios).std() / math.sqrt(len(ratios))
    offsets = boxes[:, 0] / np.maximum(1, side - widths)
    assert abs(offsets.mean() - 0.5) < 5 * math.sqrt(1 / 12 / len(offsets)) and offsets.max() > 0.99


def test_an_image_too_long_for_a_random_resized_crop_gives_its_center():
    assert images._random_resized_crop(300, 30, generator(), 0.9) == (130, 0, 170, 30)
    assert images._random_resized_crop(30, 300, generator(), 0.9) == (0, 130, 30, 170)


@pytest.mark.parametrize("size", [(64, 64), (90, 64), (5, 40), (1, 1)])
@pytest.mark.parametrize("image_size", [8, 33, 48])
def test_training_gives_squares_of_the_model_size_with_any_augmentation(size, image_size):
    rng = generator()
    for augmentation in (PAPER, STRONG, Augmentation(crop_scale=0.5), *EACH_ALONE):
        pixels = training_transform(noise(*size), image_size, rng, augmentation)
        assert pixels.dtype == np.uint8 and pixels.shape == (image_size, image_size, 3)


def test_only_the_generator_is_random():
    def several(seed):
        rng = generator(seed)
        return [training_transform(drawing(), 32, rng, STRONG) for _ in range(20)]

    np.testing.assert_array_equal(several(1), several(1))
    assert (np.array(several(1)) != np.array(several(2))).any(axis=(1, 2, 3)).all()


ENLARGE = """
import random, sys
import numpy as np
from clip_jax.data.images import Augmentation, training_transform
draw, rng = random.Random(int(sys.argv[1])), np.random.default_rng(0)
for _ in range(1_500):
    width, height = draw.randint(20, 400), draw.randint(20, 400)
    print(width, height, flush=True)
    training_transform(np.zeros((height, width, 3), np.uint8), draw.choice((96, 160, 224)), rng, Augmentation())
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_enlarging_small_images_does_not_crash(seed):
    done = subprocess.run([sys.executable, "-c", ENLARGE, str(seed)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout.splitlines()[-1]
