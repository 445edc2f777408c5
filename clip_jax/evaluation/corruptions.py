"""Synthetic distribution shift: corrupts images in four ways, at five strengths.

The strengths are those of the published code of ImageNet-C (arXiv 1903.12261) for images of 224 pixels. Lengths in
pixels are scaled with the size of the image.
"""

import functools
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

STRENGTHS = (1, 2, 3, 4, 5)
BLUR_RADIUS = (1, 2, 3, 4, 6)  # standard deviation in pixels, at an image size of 224
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, of pixels in [0, 1]
JPEG_QUALITY = (25, 18, 15, 10, 7)
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added to the value of HSV, in [0, 1]


def blur(image: np.ndarray, index: int, strength: int) -> np.ndarray:
    """Applies a Gaussian blur."""
    radius = BLUR_RADIUS[strength - 1] * image.shape[0] / 224
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def noise(image: np.ndarray, index: int, strength: int) -> np.ndarray:
    """Adds Gaussian noise. The noise depends only on ``index``, ``strength`` and the shape."""
    drawn = np.random.default_rng([index, strength]).normal(0, 255 * NOISE[strength - 1], image.shape)
    return np.clip(image + drawn, 0, 255).round().astype(np.uint8)


def jpeg(image: np.ndarray, index: int, strength: int) -> np.ndarray:
    """Compresses the image as JPEG."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=JPEG_QUALITY[strength - 1])
    return np.array(Image.open(stream))


def brightness(image: np.ndarray, index: int, strength: int) -> np.ndarray:
    """Brightens the image: raises the largest of red, green and blue, and keeps hue and saturation."""
    value = image.max(axis=2, keepdims=True).astype(np.float32)  # [S, S, 1]
    lighter = np.minimum(value + 255 * BRIGHTNESS[strength - 1], 255)
    scaled = np.where(value > 0, image * (lighter / np.maximum(value, 1)), lighter)
    return scaled.round().astype(np.uint8)


CORRUPTIONS = {"blur": blur, "noise": noise, "jpeg": jpeg, "brightness": brightness}


def corruption(name: str, strength: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """Returns a function from an image uint8 ``[S, S, 3]`` and its index to the corrupted image."""
    return functools.partial(CORRUPTIONS[name], strength=strength)
