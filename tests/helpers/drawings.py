"""Drawn images, and strong augmentations of them, for the tests of images."""

import dataclasses
import io

import numpy as np
from PIL import Image, ImageDraw

from clip_jax.data.augmentation import Augmentation
from clip_jax.data.images import decode_for_training, training_transform

PAPER = Augmentation()
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


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def drawing(size: int = 32) -> Image.Image:
    """A red square on white, whose edges, color and position are known."""
    image = Image.new("RGB", (size, size), "white")
    image.paste((220, 30, 40), (size // 4, size // 4, size // 2, size // 2))
    return image


def photograph(width: int, height: int) -> Image.Image:
    """Like a photograph: colored noise whose power falls with frequency, hard-edged shapes, and sensor noise."""
    rng = np.random.default_rng(width * height)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    frequency[0, 0] = np.inf
    spectrum = (rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))) / frequency**1.6
    channels = np.fft.irfft2(spectrum, (height, width))
    light, *colors = channels / channels.std(axis=(1, 2), keepdims=True)
    pixels = 120 + 50 * light[..., None] + 15 * np.stack((colors[0], -colors[0] - colors[1], colors[1]), axis=-1)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    for x, y in rng.random((12, 2)) * image.size:
        radius = rng.uniform(0.02, 0.1) * min(image.size)
        ImageDraw.Draw(image).circle((x, y), radius, tuple(rng.integers(256, size=3).tolist()))
    return Image.fromarray((np.asarray(image) + rng.normal(size=pixels.shape) * 3).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def training_pixels(data: bytes, image_size: int, rng: np.random.Generator, augmentation: Augmentation, **limits):
    pixels, size = decode_for_training(data, image_size, augmentation, **limits)
    return training_transform(pixels, image_size, rng, augmentation, size)
