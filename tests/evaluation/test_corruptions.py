"""Tests that stronger corruptions change more, and that each image changes in the same way every time."""

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.images import decode_image, evaluation_transform
from clip_jax.data.sources import open_source
from clip_jax.evaluation.corruptions import CORRUPTIONS, NOISE, STRENGTHS, corruption


@pytest.fixture(scope="module")
def images():
    source = open_source("emoji:noto/held_out")
    return [evaluation_transform(decode_image(source[index].image), 64) for index in range(8)]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_stronger_corruptions_change_more(images, name):
    distances = []
    for strength in STRENGTHS:
        change = corruption(name, strength)
        changed = [change(image, index) for index, image in enumerate(images)]
        assert all(one.shape == (64, 64, 3) and one.dtype == np.uint8 for one in changed)
        assert all(
            (change(image, index) == one).all() for index, (image, one) in enumerate(zip(images, changed, strict=True))
        )
        distances.append(np.abs(np.array(changed, float) - np.array(images, float)).mean())
    assert distances[0] > 0 and (np.diff(distances) > 0).all()


def test_noise_has_its_strength_and_differs_between_images():
    gray = np.full((64, 64, 3), 128, np.uint8)
    one, other = corruption("noise", 1)(gray, 0), corruption("noise", 1)(gray, 1)
    assert np.std(one) == pytest.approx(255 * NOISE[0], rel=0.05)
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] < 0.05


def test_brightness_keeps_the_hue_and_adds_to_the_value():
    brown = np.full((4, 4, 3), (100, 60, 20), np.uint8)
    lighter = corruption("brightness", 2)(brown, 0)
    before, after = (np.array(Image.fromarray(one).convert("HSV"))[0, 0].astype(int) for one in (brown, lighter))
    assert abs(after[0] - before[0]) <= 1 and abs(after[1] - before[1]) <= 2
    assert after[2] - before[2] == 51
    black = corruption("brightness", 5)(np.zeros((4, 4, 3), np.uint8), 0)
    assert (black == 128).all()


def test_blur_scales_with_the_size_of_the_image():
    def spread(size):
        line = np.zeros((size, size, 3), np.uint8)
        line[:, size // 2] = 255
        row = corruption("blur", 5)(line, 0)[size // 2, :, 0].astype(float)
        places = np.arange(size)
        mean = (row * places).sum() / row.sum()
        return np.sqrt((row * (places - mean) ** 2).sum() / row.sum()) / size

    assert spread(224) == pytest.approx(6 / 224, rel=0.1)
    assert spread(448) == pytest.approx(spread(224), rel=0.05)
