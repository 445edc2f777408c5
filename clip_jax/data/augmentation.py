"""Augments training images at random: draws outlines, changes shape and colors, blurs, and erases a rectangle."""

import dataclasses
import functools
import itertools
import math

import numpy as np
from PIL import Image, ImageFilter, ImageOps

WHITE = (255, 255, 255)
LUMA = np.array((0.299, 0.587, 0.114))  # ITU-R BT.601, as in Pillow's own grays
GRAY = np.tile(LUMA, (3, 1))
MESH_CELLS = 2  # per side; each cell costs a call to Pillow, a third of the whole cost with 3 x 3 cells at 32 px
EDGE_CONTRAST = 24  # levels between neighboring pixels: shading is below, edges of drawn shapes are above


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Strength of each augmentation after the crop. By default all are off, as in the paper.

    Augmentations that move or rotate an image fill in white, since drawings are on white. A strength is the bound of
    a uniform draw; a probability is in [0, 1].
    """

    crop_scale: float = 0.0  # smallest share of the image's area in the crop; 0: a square of the whole short side
    flip: float = 0.0  # probability of a mirror image
    rotation: float = 0.0  # degrees, either way
    zoom: float = 0.0  # 0.5: from 1.5 times smaller to 1.5 times larger
    stretch: float = 0.0  # the same for the ratio of width to height
    shear: float = 0.0  # share of the side
    translation: float = 0.0  # share of the side
    warp: float = 0.0  # share of the side by which each node of a coarse mesh moves
    hue: float = 0.0  # degrees around the color circle, either way
    saturation: float = 0.0  # 0.5: from 0.5 to 1.5 times
    brightness: float = 0.0  # 0.5: from 0.5 to 1.5 times
    tint: float = 0.0  # 0.5: each channel loses up to half of its brightness, so that white becomes colored
    grayscale: float = 0.0  # probability
    outline: float = 0.0  # probability of dark lines where colors meet
    line_drawing: float = 0.0  # probability of those lines alone, on white
    blur: float = 0.0  # largest radius in pixels
    erasing: float = 0.0  # probability of covering a random rectangle with one color


def augment(image: Image.Image, rng: np.random.Generator, augmentation: Augmentation) -> Image.Image:
    """Applies the outlines, changes of shape and color, and damage that ``augmentation`` sets.

    Colors change after the shape, so that the white that a move fills in is colored like the rest.

    Args:
      image: square RGB.
      rng: the only source of randomness.
      augmentation: strengths.

    Returns:
      RGB of the same size.
    """
    chosen = augmentation
    if rng.random() < chosen.line_drawing:
        image = draw_outlines(image, Image.new("RGB", image.size, WHITE))
    elif rng.random() < chosen.outline:
        image = draw_outlines(image, image)
    if rng.random() < chosen.flip:
        image = ImageOps.mirror(image)
    if chosen.rotation or chosen.zoom or chosen.stretch or chosen.shear or chosen.translation or chosen.warp:
        image = change_shape(image, rng, chosen)
    if chosen.hue or chosen.saturation or chosen.brightness or chosen.tint or chosen.grayscale:
        image = change_colors(image, rng, chosen)
    if chosen.blur:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, chosen.blur)))
    if rng.random() < chosen.erasing:
        image = erase(image, rng)
    return image


def draw_outlines(image: Image.Image, canvas: Image.Image) -> Image.Image:
    """Draws black lines on ``canvas`` where neighboring pixels of ``image`` differ, darker for more contrast."""
    pixels = np.asarray(image).astype(np.int16)
    contrast = np.zeros(pixels.shape, np.int16)
    contrast[:, 1:] = np.abs(np.diff(pixels, axis=1))
    np.maximum(contrast[1:], np.abs(np.diff(pixels, axis=0)), out=contrast[1:])
    red, green, blue = np.moveaxis(contrast, -1, 0)  # a maximum over this axis of 3 would take most of the time
    strongest = np.maximum(np.maximum(red, green), blue)
    darkness = (4 * (strongest - EDGE_CONTRAST)).clip(0, 255).astype(np.uint8)
    return Image.composite(Image.new("RGB", image.size), canvas, Image.fromarray(darkness))


def change_colors(image: Image.Image, rng: np.random.Generator, augmentation: Augmentation) -> Image.Image:
    """Changes hue, saturation, grayscale, brightness and tint by the product of their 3 x 3 matrices."""
    hue, more_color, more_light = rng.uniform(-1, 1, 3).tolist()
    saturation = 1 + more_color * augmentation.saturation
    if rng.random() < augmentation.grayscale:
        saturation = 0.0
    matrix = np.zeros((3, 4))
    matrix[:, :3] = (saturation * np.eye(3) + (1 - saturation) * GRAY) @ _hue_rotation(hue * augmentation.hue)
    matrix *= (1 + more_light * augmentation.brightness) * (1 - augmentation.tint * rng.random((3, 1)))
    return image.convert("RGB", tuple(matrix.ravel().tolist()))


def _hue_rotation(degrees: float) -> np.ndarray:
    # Rodrigues' rotation about the gray axis, which keeps black, grays and white. Its matrix is circulant.
    angle = math.radians(degrees)
    same = (1 + 2 * math.cos(angle)) / 3
    before, after = ((1 - math.cos(angle) + sign * math.sqrt(3) * math.sin(angle)) / 3 for sign in (-1, 1))
    return np.array(((same, before, after), (after, same, before), (before, after, same)))


@functools.lru_cache
def _mesh(side: int) -> tuple[np.ndarray, tuple[tuple[int, int, int, int], ...]]:
    """Returns the nodes of a mesh over a square image, float64 ``[row, column, (x, y)]``, and its cells' boxes."""
    ticks = np.linspace(0, side, MESH_CELLS + 1).round()
    edges = ticks.astype(int).tolist()
    across = list(itertools.pairwise(edges))
    boxes = tuple((left, top, right, bottom) for top, bottom in across for left, right in across)
    return np.stack(np.meshgrid(ticks, ticks), axis=-1), boxes


def change_shape(image: Image.Image, rng: np.random.Generator, augmentation: Augmentation) -> Image.Image:
    """Applies rotation, zoom, stretch, shear, translation and local warp in one bilinear resampling."""
    turn, larger, wider, slant, right, down = rng.uniform(-1, 1, 6).tolist()
    angle, slant = math.radians(turn * augmentation.rotation), slant * augmentation.shear
    zoom, stretch = larger * math.log1p(augmentation.zoom), wider / 2 * math.log1p(augmentation.stretch)
    # The matrix maps the result to the image, so the zoom has a minus sign. It is stretch, shear, then rotation.
    wide, high, cos, sin = math.exp(stretch - zoom), math.exp(-stretch - zoom), math.cos(angle), math.sin(angle)
    matrix = np.array(((wide * (cos - slant * sin), wide * (sin + slant * cos)), (-high * sin, high * cos)))

    side, center = image.width, image.width / 2
    nodes, boxes = _mesh(side)
    moves = center + side * augmentation.translation * np.array((right, down))
    if augmentation.warp:
        moves = moves + side * augmentation.warp * rng.uniform(-1, 1, nodes.shape)
    sources = (nodes - center) @ matrix + moves
    # Pillow takes a cell's corners in the order upper left, lower left, lower right, upper right.
    corners = np.concatenate((sources[:-1, :-1], sources[1:, :-1], sources[1:, 1:], sources[:-1, 1:]), axis=-1)
    mesh = list(zip(boxes, corners.reshape(-1, 8).tolist(), strict=True))
    return image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR, fillcolor=WHITE)


def erase(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Covers a random rectangle, with sides of 1/8 to 1/2 of the image's, with one random color."""
    size = np.array(image.size)
    sides = (size * rng.uniform(1 / 8, 1 / 2, 2)).astype(int)
    left, top = ((size - sides) * rng.random(2)).astype(int).tolist()
    covered = image.copy()
    covered.paste(tuple(rng.integers(256, size=3).tolist()), (left, top, left + int(sides[0]), top + int(sides[1])))
    return covered
