"""Images made by hand, and augmentations of them."""

import dataclasses

import numpy as np
from PIL import Image

from clip_jax.data.augmentation import Augmentation

STRONG = Augmentation(
    flip=0.5,
    rotation=30,
    zoom=0.5,
    stretch=0.5,
    shear=0.2,
    translation=0.2,
    warp=0.1,
    hue=90,
    saturation=0.5,
    brightness=0.5,
    tint=0.5,
    grayscale=0.3,
    outline=0.5,
    line_drawing=0.3,
    blur=1.0,
    erasing=0.5,
)
EACH_ALONE = [
    Augmentation(**{field.name: max(1.0, getattr(STRONG, field.name))})
    for field in dataclasses.fields(Augmentation)
    if getattr(STRONG, field.name)
]


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def drawing(size: int = 32) -> Image.Image:
    """A red square on white: something whose edges, color and place can be told."""
    image = Image.new("RGB", (size, size), "white")
    image.paste((220, 30, 40), (size // 4, size // 4, size // 2, size // 2))
    return image
