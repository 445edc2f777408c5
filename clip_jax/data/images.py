"""From an encoded picture to the square of pixels that the image tower sees, with Pillow and NumPy alone.

Training uses the paper's only augmentation, a random square crop (section 2.4 of arXiv 2103.00020), unless an
:class:`Augmentation` asks for more. Evaluation resizes and crops as OpenAI's preprocessing does, pixel for pixel.
"""

import dataclasses
import io
import math

import numpy as np
from PIL import Image, ImageFilter, ImageOps

MAX_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 100  # a picture's long side is resized with it: one pixel by 65,000 would become 14 million
WHITE = (255, 255, 255)
LUMA = np.array((0.299, 0.587, 0.114))  # ITU-R BT.601, as in Pillow's own greys
MESH_CELLS = 3  # along a side
EDGE_CONTRAST = 24  # levels between neighbours: what shading stays below and drawn shapes exceed


class ImageError(ValueError):
    """A picture that cannot be used; the message is one line that says why."""


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How strongly training pictures are varied after the crop. All off, which is the default, is the paper's way.

    What moves or turns a picture fills in white, as drawings on white want it. Strengths are bounds of uniform
    draws; probabilities are in [0, 1].
    """

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


def decode_image(data: bytes) -> Image.Image:
    """Decodes a picture to RGB: upright by its EXIF orientation, transparency on white, an animation's first frame.

    Raises:
      ImageError: the data is no picture, is damaged, or is too large or too long and thin.
    """
    try:
        return to_rgb(Image.open(io.BytesIO(data)))
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders let whatever a broken file provokes escape
        raise ImageError(" ".join(str(error).split()) or type(error).__name__) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode as upright RGB, transparency on white.

    Raises:
      ImageError: it is too large, too long and thin, or its pixels have no known range.
    """
    _check_size(*image.size)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image).convert("RGB")
    if image.mode.startswith("I"):
        # 16 bits a pixel, which convert("RGB") would clip to the lowest 255 of 65,536 levels.
        image = Image.fromarray((np.asarray(image).clip(0, 65_535) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ImageError("floating-point pixels have no known range")
    return image.convert("RGB")


def _check_size(width: int, height: int) -> None:
    if not width or not height:
        raise ImageError(f"{width} x {height} pixels are no picture")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(f"{width} x {height} pixels: one side is over {MAX_ASPECT_RATIO} times the other")


def evaluation_transform(image: Image.Image, image_size: int) -> np.ndarray:
    """Short side to S by bicubic resampling, then the central square, rounded as torchvision does for OpenAI's code.

    Args:
      image: RGB, any size.
      image_size: S.

    Returns:
      uint8 ``[S, S, 3]``.
    """
    image = _resize_short_side(image, image_size)
    left, top = (round((side - image_size) / 2) for side in image.size)
    return np.array(image.crop((left, top, left + image_size, top + image_size)))


def training_transform(
    image: Image.Image, image_size: int, rng: np.random.Generator, augmentation: Augmentation
) -> np.ndarray:
    """The paper's random square crop of the picture resized by its short side, then what ``augmentation`` adds.

    Args:
      image: RGB, any size.
      image_size: S.
      rng: the only source of chance.
      augmentation: all off by default.

    Returns:
      uint8 ``[S, S, 3]``.
    """
    image = _resize_short_side(image, image_size)
    left, top = (int(rng.integers(side - image_size + 1)) for side in image.size)
    image = image.crop((left, top, left + image_size, top + image_size))
    return np.array(augment(image, rng, augmentation))


def _resize_short_side(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    return image.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)


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
    darkness = (4 * (contrast.max(axis=-1) - EDGE_CONTRAST)).clip(0, 255).astype(np.uint8)
    return Image.composite(Image.new("RGB", image.size), canvas, Image.fromarray(darkness))


def change_colors(image: Image.Image, rng: np.random.Generator, augmentation: Augmentation) -> Image.Image:
    """Hue, saturation, grey, brightness and tint as the one 3 x 3 matrix that they multiply to."""
    gray = np.tile(LUMA, (3, 1))
    saturation = 1 + rng.uniform(-1, 1) * augmentation.saturation
    if rng.random() < augmentation.grayscale:
        saturation = 0.0
    matrix = (saturation * np.eye(3) + (1 - saturation) * gray) @ _hue_rotation(rng.uniform(-1, 1) * augmentation.hue)
    light = 1 + rng.uniform(-1, 1) * augmentation.brightness
    matrix = light * (1 - augmentation.tint * rng.random((3, 1))) * matrix
    return image.convert("RGB", tuple(np.pad(matrix, ((0, 0), (0, 1))).ravel().tolist()))


def _hue_rotation(degrees: float) -> np.ndarray:
    # Rodrigues' rotation about the grey axis: black, greys and white stay what they are.
    angle = math.radians(degrees)
    cross = np.array(((0, -1, 1), (1, 0, -1), (-1, 1, 0))) / math.sqrt(3)
    return math.cos(angle) * np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) / 3


def change_shape(image: Image.Image, rng: np.random.Generator, augmentation: Augmentation) -> Image.Image:
    """Rotation, zoom, stretch, shear, translation and local warp in one bilinear resampling."""
    angle = math.radians(rng.uniform(-1, 1) * augmentation.rotation)
    zoom = rng.uniform(-1, 1) * math.log1p(augmentation.zoom)
    stretch = rng.uniform(-0.5, 0.5) * math.log1p(augmentation.stretch)
    rotation = np.array(((math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))))
    shear = np.array(((1, rng.uniform(-1, 1) * augmentation.shear), (0, 1)))
    # From a place in the result to a place in the picture, hence the minus sign of the zoom.
    matrix = np.diag(np.exp((stretch - zoom, -stretch - zoom))) @ shear @ rotation

    ticks = np.linspace(0, image.width, MESH_CELLS + 1).round()
    nodes = np.stack(np.meshgrid(ticks, ticks), axis=-1)  # [row, column, (x, y)]
    moves = augmentation.warp * rng.uniform(-1, 1, nodes.shape) + augmentation.translation * rng.uniform(-1, 1, 2)
    center = image.width / 2
    sources = ((nodes - center) @ matrix + center + image.width * moves).tolist()
    edges = ticks.astype(int).tolist()
    mesh = [
        (
            (edges[column], edges[row], edges[column + 1], edges[row + 1]),
            (
                *sources[row][column],
                *sources[row + 1][column],
                *sources[row + 1][column + 1],
                *sources[row][column + 1],
            ),
        )
        for row in range(MESH_CELLS)
        for column in range(MESH_CELLS)
    ]
    return image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR, fillcolor=WHITE)


def erase(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Covers a rectangle, its sides from an eighth to a half of the picture's, with one random colour."""
    size = np.array(image.size)
    sides = (size * rng.uniform(1 / 8, 1 / 2, 2)).astype(int)
    left, top = ((size - sides) * rng.random(2)).astype(int).tolist()
    covered = image.copy()
    covered.paste(tuple(rng.integers(256, size=3).tolist()), (left, top, left + int(sides[0]), top + int(sides[1])))
    return covered
