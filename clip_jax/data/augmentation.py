"""How training images are varied: lines, shape, colors and damage, each as strong as the config wants."""

import dataclasses
import functools
import itertools
import math

import numpy as np
from PIL import Image, ImageFilter, ImageOps

WHITE = (255, 255, 255)
LUMA = np.array((0.299, 0.587, 0.114))  # ITU-R BT.601, as in Pillow's own grays
GRAY = np.tile(LUMA, (3, 1))
MESH_CELLS = 2  # along a side; each costs a call of Pillow's, a third of what 3 x 3 of them cost in all at 32 px
EDGE_CONTRAST = 24  # levels between neighbours: what shading stays below and drawn shapes exceed


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How strongly training pictures are varied after the crop. All off, which is the default, is the paper's way.

    What moves or turns a picture fills in white, as drawings on white want it. Strengths are bounds of uniform
    draws; probabilities are in [0, 1].
    """

    crop_scale: float = 0.0  # least share of the picture's area in the crop; 0: a square of the whole short side
    flip: float = 0.0  # probability of a mirror image
    rotation: float = 0.0  # degrees, either way
    zoom: float = 0.0  # 0.5: from 1.5 times smaller to 1.5 times larger
    stretch: float = 0.0  # the same for width against height
    shear: float = 0.0  # of the side
    translation: float = 0.0  # of the side
    warp: float = 0.0  # of the side: how far each node of a coarse mesh moves by itself
    hue: float = 0.0  # degrees around the colour circle, either way
    saturation: float = 0.0  # 0.5: from half the colour to 1.5 times
    brightness: float = 0.0  # 0.5: from half the light to 1.5 times
    tint: float = 0.0  # 0.5: each channel may lose up to half of its light; white paper becomes coloured
    grayscale: float = 0.0  # probability
    outline: float = 0.0  # probability of dark lines where colours meet
    line_drawing: float = 0.0  # probability of those lines alone, on white
    blur: float = 0.0  # largest radius in pixels
    erasing: float = 0.0  # probability of a rectangle of one colour somewhere


def augment(image: Image.Image, rng: np.random.Generator, augmentation: Augmentation) -> Image.Image:
    """Lines, shape, colours, damage, each as strong as ``augmentation`` says: square RGB to RGB of the same size.

    Colours come after shape so that the white that a move fills in is coloured with the rest.
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
    """Black lines on ``canvas`` wherever neighbouring pixels of ``image`` differ strongly, darker for more contrast."""
    pixels = np.asarray(image).astype(np.int16)
    contrast = np.zeros(pixels.shape, np.int16)
    contrast[:, 1:] = np.abs(np.diff(pixels, axis=1))
    np.maximum(contrast[1:], np.abs(np.diff(pixels, axis=0)), out=contrast[1:])
    red, green, blue = np.moveaxis(contrast, -1, 0)  # a maximum over so short an axis takes longer than all the rest
    strongest = np.maximum(np.maximum(red, green), blue)
    darkness = (4 * (strongest - EDGE_CONTRAST)).clip(0, 255).astype(np.uint8)
    return Image.composite(Image.new("RGB", image.size), canvas, Image.fromarray(darkness))


def change_colors(image: Image.Image, rng: np.random.Generator, augmentation: Augmentation) -> Image.Image:
    """Hue, saturation, gray, brightness and tint as the one 3 x 3 matrix that they multiply to."""
    hue, more_color, more_light = rng.uniform(-1, 1, 3).tolist()
    saturation = 1 + more_color * augmentation.saturation
    if rng.random() < augmentation.grayscale:
        saturation = 0.0
    matrix = np.zeros((3, 4))
    matrix[:, :3] = (saturation * np.eye(3) + (1 - saturation) * GRAY) @ _hue_rotation(hue * augmentation.hue)
    matrix *= (1 + more_light * augmentation.brightness) * (1 - augmentation.tint * rng.random((3, 1)))
    return image.convert("RGB", tuple(matrix.ravel().tolist()))


def _hue_rotation(degrees: float) -> np.ndarray:
    # Rodrigues' rotation about the gray axis: black, grays and white stay what they are. Its matrix is circulant.
    angle = math.radians(degrees)
    same = (1 + 2 * math.cos(angle)) / 3
    before, after = ((1 - math.cos(angle) + sign * math.sqrt(3) * math.sin(angle)) / 3 for sign in (-1, 1))
    return np.array(((same, before, after), (after, same, before), (before, after, same)))


@functools.lru_cache
def _mesh(side: int) -> tuple[np.ndarray, tuple[tuple[int, int, int, int], ...]]:
    """The nodes of a mesh over a square image, float64 ``[row, column, (x, y)]``, and the boxes of its cells."""
    ticks = np.linspace(0, side, MESH_CELLS + 1).round()
    edges = ticks.astype(int).tolist()
    across = list(itertools.pairwise(edges))
    boxes = tuple((left, top, right, bottom) for top, bottom in across for left, right in across)
    return np.stack(np.meshgrid(ticks, ticks), axis=-1), boxes


def change_shape(image: Image.Image, rng: np.random.Generator, augmentation: Augmentation) -> Image.Image:
    """Rotation, zoom, stretch, shear, translation and local warp in one bilinear resampling."""
    turn, larger, wider, slant, right, down = rng.uniform(-1, 1, 6).tolist()
    angle, slant = math.radians(turn * augmentation.rotation), slant * augmentation.shear
    zoom, stretch = larger * math.log1p(augmentation.zoom), wider / 2 * math.log1p(augmentation.stretch)
    # From a place in the result to a place in the image, hence the minus sign of the zoom: stretch, shear, rotation.
    wide, high, cos, sin = math.exp(stretch - zoom), math.exp(-stretch - zoom), math.cos(angle), math.sin(angle)
    matrix = np.array(((wide * (cos - slant * sin), wide * (sin + slant * cos)), (-high * sin, high * cos)))

    side, center = image.width, image.width / 2
    nodes, boxes = _mesh(side)
    moves = center + side * augmentation.translation * np.array((right, down))
    if augmentation.warp:
        moves = moves + side * augmentation.warp * rng.uniform(-1, 1, nodes.shape)
    sources = (nodes - center) @ matrix + moves
    # Pillow wants a cell's corners from the upper left one on, downward first.
    corners = np.concatenate((sources[:-1, :-1], sources[1:, :-1], sources[1:, 1:], sources[:-1, 1:]), axis=-1)
    mesh = list(zip(boxes, corners.reshape(-1, 8).tolist(), strict=True))
    return image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR, fillcolor=WHITE)


def erase(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Covers a rectangle, its sides from an eighth to a half of the picture's, with one random colour."""
    size = np.array(image.size)
    sides = (size * rng.uniform(1 / 8, 1 / 2, 2)).astype(int)
    left, top = ((size - sides) * rng.random(2)).astype(int).tolist()
    covered = image.copy()
    covered.paste(tuple(rng.integers(256, size=3).tolist()), (left, top, left + int(sides[0]), top + int(sides[1])))
    return covered
