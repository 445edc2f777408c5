"""Decodes, resizes and crops encoded images to the square of pixels that the image tower takes.

Training uses the paper's only augmentation, a random square crop (section 2.4 of arXiv 2103.00020), and those that an
:class:`~clip_jax.data.augmentation.Augmentation` adds. It resizes only the crop, and decodes large JPEGs at a lower
resolution. Evaluation resizes and crops by a model's :class:`~clip_jax.models.preprocessing.Preprocessing`, by default
OpenAI's.
"""

import contextlib
import dataclasses
import functools
import io
import math
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from clip_jax.data.augmentation import WHITE, Augmentation, augment
from clip_jax.errors import one_line
from clip_jax.models.preprocessing import OPENAI_PREPROCESSING, Preprocessing

try:
    import cykooz_resizer
except ImportError:  # no wheels for Linux on ARM: Pillow is within a level or two, and takes five times as long
    cykooz_resizer = None

MAX_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 100  # evaluation also resizes the long side: 1 x 65,000 pixels would become 14 million
CROP_ASPECT_RATIOS = (3 / 4, 4 / 3)  # width to height; both as in torchvision's RandomResizedCrop
CROP_ATTEMPTS = 10
# A JPEG may be decoded at a lower resolution if the crop stays at least this many times as large as its final size. The
# pixels of sharp, already reduced photographs change by up to 1.6 levels on average at 1.5, and by 0.7 at 2.5.
OVERSAMPLING = 2.5
TRANSPOSES = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation, to make the image upright
IDENTIFIED_ONLY = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow identifies these formats but cannot decode them
FAST_FILTERS = {"bicubic": "catmull_rom", "bilinear": "bilinear"}  # the names that cykooz.resizer uses

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _check_size has a lower limit
warnings.filterwarnings("ignore", module=r"PIL\.")  # several lines for each image with damaged metadata


class ImageError(ValueError):
    """An image cannot be used. The message is one line.

    ``reason`` is undecodable, too_large (in pixels), too_small or extreme_aspect_ratio.
    """

    def __init__(self, message: str, reason: str = "undecodable"):
        super().__init__(message)
        self.reason = reason


def decode_image(
    data: bytes,
    min_side: int = 1,
    max_aspect_ratio: float = MAX_ASPECT_RATIO,
    max_pixels: int | None = None,
    as_stored: bool = False,
) -> Image.Image:
    """Decodes as :func:`decode_pixels` to a Pillow image in RGB. ``as_stored`` is that of :func:`to_rgb`.

    Raises:
      ImageError: as :func:`decode_pixels`.
    """
    if as_stored:
        with _as_image_error():
            return to_rgb(_open(data), min_side, max_aspect_ratio, max_pixels, as_stored=True)
    return Image.fromarray(decode_pixels(data, min_side, max_aspect_ratio, max_pixels))


def decode_pixels(
    data: bytes, min_side: int = 1, max_aspect_ratio: float = MAX_ASPECT_RATIO, max_pixels: int | None = None
) -> np.ndarray:
    """Decodes an image to RGB: upright by its EXIF orientation, on white if transparent, an animation's first frame.

    Args:
      data: an encoded image in any format that Pillow decodes. The pixels equal Pillow's, whichever library decodes.
      min_side: smallest allowed short side, in pixels.
      max_aspect_ratio: largest allowed ratio of the long side to the short one.
      max_pixels: largest allowed number of pixels; 64 million by default.

    Returns:
      uint8 ``[H, W, 3]``.

    Raises:
      ImageError: the data is not an image, is damaged, or has a size outside the limits. The size is checked before
        memory for the pixels is allocated.
    """
    return _decode(data, min_side, max_aspect_ratio, max_pixels=max_pixels)[0]


def _decode(
    data: bytes, min_side: int, max_aspect_ratio: float, enough: float = math.inf, max_pixels: int | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns the pixels and the image's width and height. A JPEG may be reduced to sides of ``enough`` pixels."""
    with _as_image_error():
        if data.startswith(b"\xff\xd8\xff") and (size := _plain_jpeg_size(data)):
            _check_size(*size, min_side, max_aspect_ratio, max_pixels)
            side = math.ceil(min(enough, max(size)))
            # simplejpeg raises where libjpeg only warns; Pillow then decides.
            with contextlib.suppress(ValueError):
                return simplejpeg.decode_jpeg(data, min_height=side, min_width=side, min_factor=2), size
        image = to_rgb(_open(data), min_side, max_aspect_ratio, max_pixels)
        return np.asarray(image), image.size


@contextlib.contextmanager
def _as_image_error() -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds of errors for damaged files
        reason = "too_large" if isinstance(error, Image.DecompressionBombError) else "undecodable"
        message = one_line(error)
        if isinstance(error, UnidentifiedImageError):
            message = "not an image, or in an unsupported format"  # Pillow's message has a memory address
        raise ImageError(message, reason) from error


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")  # a program, which Pillow would run with Ghostscript


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Returns the lower-case suffixes, such as ``.jpg``, of the formats that are decoded."""
    Image.init()
    read = {*_formats(), "MPO"} - IDENTIFIED_ONLY  # MPO is read as JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in read)


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Returns width and height of a gray or RGB JPEG that is stored upright; None for any other."""
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if color_space not in ("Gray", "YCbCr", "RGB"):
        return None
    if _may_be_rotated(data) and _orientation(_open(data)) != 1:
        return None
    return width, height


def _may_be_rotated(data: bytes) -> bool:
    """Whether a JPEG has an EXIF or XMP segment. Pillow can take longer to read one than to decode the image."""
    offset = 2
    while data[offset : offset + 1] == b"\xff":
        marker = data[offset + 1 : offset + 2]
        if marker == b"\xda":  # the scan: no metadata follows
            return False
        if marker == b"\xe1":
            return True
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return True  # bytes between segments, which only Pillow skips


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 (upright) if it is missing or cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        if isinstance(value, tuple | list | bytes):
            value = value[0]
        value = int(value)
    except Exception:  # each kind of damage raises its own
        return 1
    return value if value in TRANSPOSES else 1


def to_rgb(
    image: Image.Image,
    min_side: int = 1,
    max_aspect_ratio: float = MAX_ASPECT_RATIO,
    max_pixels: int | None = None,
    as_stored: bool = False,
) -> Image.Image:
    """Converts a Pillow image of any mode to upright RGB, on white if transparent. ``as_stored`` only loads it.

    Raises:
      ImageError: its size is outside the limits (see :func:`decode_pixels`), or its pixels have no known range.
    """
    _check_size(*image.size, min_side, max_aspect_ratio, max_pixels)
    image.load()
    # The images of an ICO can be larger than its directory states.
    _check_size(*image.size, min_side, max_aspect_ratio, max_pixels)
    if as_stored:
        return image
    if (transpose := TRANSPOSES[_orientation(image)]) is not None:
        image = image.transpose(transpose)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image).convert("RGB")
    if image.mode.startswith("I"):
        # 16 bits per pixel: convert("RGB") would clip to the lowest 255 of 65,536 levels.
        image = Image.fromarray((np.asarray(image).clip(0, 65_535) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ImageError("floating-point pixels have no known range")
    return image.convert("RGB")


def _check_size(width: int, height: int, min_side: int, max_aspect_ratio: float, max_pixels: int | None) -> None:
    short, long = sorted((width, height))
    if short < 1:
        raise ImageError(f"{width} x {height} pixels: the image is empty", "too_small")
    if short < min_side:
        raise ImageError(f"{width} x {height} pixels: one side is below {min_side}", "too_small")
    largest = MAX_PIXELS if max_pixels is None else max_pixels
    if width * height > largest:
        raise ImageError(f"{width} x {height} pixels are more than {largest:,}", "too_large")
    if long > max_aspect_ratio * short:
        raise ImageError(
            f"{width} x {height} pixels: one side is over {max_aspect_ratio:g} times the other", "extreme_aspect_ratio"
        )


def evaluation_transform(
    image: Image.Image, image_size: int, preprocessing: Preprocessing = OPENAI_PREPROCESSING
) -> np.ndarray:
    """Resizes an image and crops or pads it around its center, with the rounding of torchvision and open_clip.

    Args:
      image: any size and mode. It becomes RGB after it is resized, as in OpenAI's code.
      image_size: S, in pixels.
      preprocessing: for images of S pixels.

    Returns:
      uint8 ``[S, S, 3]``.
    """
    size = _resized_size(image.size, image_size, preprocessing)
    image = image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])
    left, top = (
        round((side - image_size) / 2) if side > image_size else -((image_size - side) // 2) for side in image.size
    )
    if min(size) < image_size:
        image = _padded(image, image_size, left, top, preprocessing.fill_color)
        left, top = max(0, left), max(0, top)
    return np.array(image.crop((left, top, left + image_size, top + image_size)).convert("RGB"))


def _padded(image: Image.Image, side: int, left: int, top: int, fill_color: int) -> Image.Image:
    """Adds the margins that a crop at this position lacks, in the image's own mode, as torchvision pads."""
    width, height = max(side, image.width), max(side, image.height)
    bands = len(image.getbands())
    canvas = Image.new(image.mode, (width, height), fill_color if bands == 1 else (fill_color,) * bands)
    if image.mode == "P":
        canvas.putpalette(image.getpalette())
    canvas.paste(image, (max(0, -left), max(0, -top)))
    return canvas


def decode_for_training(
    data: bytes,
    image_size: int,
    augmentation: Augmentation,
    min_side: int = 1,
    max_aspect_ratio: float = MAX_ASPECT_RATIO,
    preprocessing: Preprocessing = OPENAI_PREPROCESSING,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decodes an image for :func:`training_transform`, a large JPEG at a lower resolution to save time.

    A JPEG is decoded at half its resolution or less if every crop of it stays 2.5 times as large as S. On photographs
    that changes the result by at most 1 level on average, and single pixels at hard edges by up to 20.

    Args:
      data: see :func:`decode_pixels`, also for ``min_side`` and ``max_aspect_ratio``.
      image_size: S, in pixels.
      augmentation: that of the crop.
      preprocessing: for images of S pixels.

    Returns:
      The pixels, uint8 ``[H, W, 3]``, and the width and height of the encoded image.

    Raises:
      ImageError: as :func:`decode_pixels`.
    """
    enough = OVERSAMPLING * max(image_size, preprocessing.resize_size) / _least_side(augmentation)
    if preprocessing.interpolation in ("nearest", "box"):  # their result depends on the resolution
        enough = math.inf
    return _decode(data, min_side, max_aspect_ratio, enough)


def _least_side(augmentation: Augmentation) -> float:
    """Returns the shortest side that a crop can have, as a share of the image's short side."""
    return min(1.0, math.sqrt(augmentation.crop_scale * CROP_ASPECT_RATIOS[0])) if augmentation.crop_scale else 1.0


def training_transform(
    image: Image.Image | np.ndarray,
    image_size: int,
    rng: np.random.Generator,
    augmentation: Augmentation,
    size: tuple[int, int] | None = None,
    preprocessing: Preprocessing = OPENAI_PREPROCESSING,
) -> np.ndarray:
    """Takes the paper's random square crop of the resized image, and then applies ``augmentation``.

    The image is resized and padded as by :func:`evaluation_transform`. Where it is larger than the crop, by default
    along its long side, the position of the crop is random. With ``augmentation.crop_scale`` the crop is a random part
    of the whole image instead, whatever ``resize_mode`` is, as in open_clip's training.

    Only the crop is resized, with antialiasing. On photographs, bicubic, that differs from Pillow's resizing by at most
    0.3 levels on average, and in single pixels at hard edges by up to 15. A crop of the final size keeps its pixels.

    Args:
      image: RGB, any size; an array is uint8 ``[H, W, 3]``.
      image_size: S, in pixels.
      rng: the only source of randomness.
      augmentation: strengths of the augmentations.
      size: width and height of the encoded image, if ``image`` is a JPEG decoded at n/8 of its resolution.
      preprocessing: for images of S pixels.

    Returns:
      uint8 ``[S, S, 3]``.
    """
    pixels = np.asarray(image)
    width, height = size or pixels.shape[1::-1]
    target = (0, 0, image_size, image_size)  # position of the image in the square
    if augmentation.crop_scale:
        box = _random_resized_crop(width, height, rng, augmentation.crop_scale)
    else:
        box, target = _random_square_crop((width, height), image_size, rng, preprocessing)
    scale = 8 * pixels.shape[1] // width / 8  # libjpeg rounds the sides up, but not the scale
    left, top, right, bottom = target
    box = [scale * end for end in box]
    pixels = _resize_box(pixels, box, (right - left, bottom - top), preprocessing.interpolation)
    if pixels.shape[:2] != (image_size, image_size):
        padded = np.full((image_size, image_size, 3), preprocessing.fill_color, np.uint8)
        padded[top:bottom, left:right] = pixels
        pixels = padded
    if _only_crops(augmentation):
        rng.random(4)  # as many as augment draws: later draws must not depend on whether it is called
        return pixels
    return np.array(augment(Image.fromarray(pixels), rng, augmentation))


@functools.lru_cache
def _only_crops(augmentation: Augmentation) -> bool:
    return dataclasses.replace(augmentation, crop_scale=0.0) == Augmentation()


def _random_square_crop(
    size: tuple[int, int], image_size: int, rng: np.random.Generator, preprocessing: Preprocessing
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Returns left, top, right and bottom of the crop in the image, and of its position in the square."""
    resized = _resized_size(size, image_size, preprocessing)
    begins = [int(rng.integers(side - image_size + 1)) if side >= image_size else 0 for side in resized]
    ends = [min(side, begin + image_size) for side, begin in zip(resized, begins, strict=True)]
    scales = [own / side for own, side in zip(size, resized, strict=True)]
    box = (
        *(begin * scale for begin, scale in zip(begins, scales, strict=True)),
        *(min(own, end * scale) for own, end, scale in zip(size, ends, scales, strict=True)),
    )
    margins = [(image_size - (end - begin)) // 2 for begin, end in zip(begins, ends, strict=True)]
    return box, (*margins, margins[0] + ends[0] - begins[0], margins[1] + ends[1] - begins[1])


def _random_resized_crop(width: int, height: int, rng: np.random.Generator, least: float) -> tuple[int, ...]:
    """Returns left, top, right and bottom as torchvision's ``RandomResizedCrop(scale=(least, 1))`` draws them."""
    narrowest, widest = CROP_ASPECT_RATIOS
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(least, 1)
        ratio = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1))
            return left, top, left + wide, top + high
    wide, high = min(width, round(height * widest)), min(height, round(width / narrowest))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def _resize_box(pixels: np.ndarray, box: list[float], size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resizes a box of uint8 ``[H, W, 3]`` to ``size`` (width, height) with antialiasing. The box may be fractional."""
    left, top, right, bottom = box
    if (right - left, bottom - top) == size and left == int(left) and top == int(top):
        return pixels[int(top) : int(bottom), int(left) : int(right)].copy()
    # Enlarging crops with fractional ends crashes cykooz.resizer 4.0.1. It probably takes the last pixel's window
    # for the one that reaches furthest: pixels less than one apart share a window, whose trailing zeros are cut.
    enlarges = right - left < size[0] or bottom - top < size[1]
    if cykooz_resizer is None or enlarges or interpolation not in FAST_FILTERS:
        return np.array(Image.fromarray(pixels).resize(size, Image.Resampling[interpolation.upper()], box))
    height, width = pixels.shape[:2]
    source = cykooz_resizer.ImageData(width, height, cykooz_resizer.PixelType.U8x3, pixels.tobytes())
    resized = cykooz_resizer.ImageData(*size, cykooz_resizer.PixelType.U8x3)
    options = cykooz_resizer.ResizeOptions(
        cykooz_resizer.ResizeAlg.convolution(getattr(cykooz_resizer.FilterType, FAST_FILTERS[interpolation])),
        crop_box=cykooz_resizer.CropBox(left, top, right - left, bottom - top),
    )
    cykooz_resizer.Resizer().resize(source, resized, options)
    return np.frombuffer(resized.get_buffer(), np.uint8).reshape(*size[::-1], 3)


def _resized_size(size: tuple[int, int], image_size: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Returns the width and height to which an image of this ``size`` is resized."""
    target = preprocessing.resize_size or image_size
    if preprocessing.resize_mode == "squash":
        return target, target
    if preprocessing.resize_mode == "longest":
        ratio = max(size) / target
        return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))
    short = min(size)
    return int(target * size[0] / short), int(target * size[1] / short)
