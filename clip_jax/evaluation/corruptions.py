"""Synthetic distribution shift: corruptions in five strengths, on any picture.

The strengths are those of ImageNet-C at 224 pixels (arXiv 1903.12261, its published code); what is measured in pixels
goes with the picture's size.
"""

import functools
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

STRENGTHS = (1, 2, 3, 4, 5)
BLUR_RADIUS = (1, 2, 3, 4, 6)  # standard deviation in pixels of 224
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, of a range of 1
JPEG_QUALITY = (25, 18, 15, 10, 7)
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added to the value of hue, saturation and value


def blur(picture: np.ndarray, index: int, strength: int) -> np.ndarray:
    """A Gaussian blur."""
    radius = BLUR_RADIUS[strength - 1] * picture.shape[0] / 224
    return np.array(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def noise(picture: np.ndarray, index: int, strength: int) -> np.ndarray:
    """Gaussian noise, always the same on the picture of this index."""
    drawn = np.random.default_rng([index, strength]).normal(0, 255 * NOISE[strength - 1], picture.shape)
    return np.clip(picture + drawn, 0, 255).round().astype(np.uint8)


def jpeg(picture: np.ndarray, index: int, strength: int) -> np.ndarray:
    """What JPEG loses."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=JPEG_QUALITY[strength - 1])
    return np.array(Image.open(stream))


def brightness(picture: np.ndarray, index: int, strength: int) -> np.ndarray:
    """Too much light: the greatest of red, green and blue grows, hue and saturation stay."""
    value = picture.max(axis=2, keepdims=True).astype(np.float32)  # [S, S, 1]
    lighter = np.minimum(value + 255 * BRIGHTNESS[strength - 1], 255)
    scaled = np.where(value > 0, picture * (lighter / np.maximum(value, 1)), lighter)
    return scaled.round().astype(np.uint8)


CORRUPTIONS = {"blur": blur, "noise": noise, "jpeg": jpeg, "brightness": brightness}


def corruption(name: str, strength: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """From a picture uint8 ``[S, S, 3]`` and its index to the corrupted one; ``strength`` is 1 to 5."""
    return functools.partial(CORRUPTIONS[name], strength=strength)
