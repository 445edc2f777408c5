"""Images in, pixels out: Pillow and hand-computed pixels are the reference, every image is made here."""

import contextlib
import dataclasses
import io
import math
import pickle
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
from drawings import EACH_ALONE, STRONG, drawing, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps

from clip_jax.data import images
from clip_jax.data.augmentation import Augmentation, augment
from clip_jax.data.images import (
    ImageError,
    decode_for_training,
    decode_image,
    decode_pixels,
    evaluation_transform,
    training_transform,
)
from clip_jax.models.preprocessing import Preprocessing

PAPER = Augmentation()


def photograph(width: int, height: int) -> Image.Image:
    """Colored noise whose power falls with frequency as a photograph's does, hard-edged shapes, a sensor's noise."""
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


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_become_white_and_half_transparent_ones_are_mixed_with_it(mode):
    black, channels = Image.new("L", (3, 1)), len(mode) - 1
    alpha = Image.fromarray(np.array([[0, 51, 255]], np.uint8))
    image = Image.merge(mode, [black] * channels + [alpha])
    assert np.asarray(decode_image(encoded(image)))[0, :, 0].tolist() == [255, 204, 0]


def test_a_palettes_transparent_entry_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    decoded = decode_image(encoded(image, transparency=0))
    assert np.asarray(decoded).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_a_transparent_color_of_an_opaque_mode_becomes_white():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 8, 7))
    assert np.asarray(decode_image(encoded(image, transparency=(1, 2, 3)))).tolist() == [[[255] * 3, [9, 8, 7]]]


def test_a_palette_without_transparency_keeps_its_colors():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert np.asarray(decode_image(encoded(image))).tolist() == [[[10, 20, 30], [200, 100, 50]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    image = noise(5, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encoded(image, exif=exif))
    upright = {
        1: lambda pixels: pixels,
        2: lambda pixels: pixels[:, ::-1],
        3: lambda pixels: pixels[::-1, ::-1],
        4: lambda pixels: pixels[::-1],
        5: lambda pixels: pixels.transpose(1, 0, 2),
        6: lambda pixels: np.rot90(pixels, -1),
        7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
        8: lambda pixels: np.rot90(pixels, 1),
    }[orientation](np.asarray(image))
    np.testing.assert_array_equal(np.asarray(decoded), upright)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(64, 64), (37, 53), (2, 1), (8, 100)])
def test_a_plain_jpeg_has_pillows_pixels_but_is_not_decoded_by_pillow(mode, size, monkeypatch):
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1, "quality": 40}):
        data = encoded(photograph(*size).convert(mode), "JPEG", **options)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        with monkeypatch.context() as patch:
            patch.setattr(images, "to_rgb", lambda *_: pytest.fail("decoded by Pillow"))
            np.testing.assert_array_equal(decode_pixels(data), expected)


def jpeg_with_segment(image: Image.Image, content: bytes) -> bytes:
    """A JPEG with an APP1 segment, which holds EXIF or XMP, before all others."""
    data = encoded(image, "JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + data[2:]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpegs_orientation_is_applied_wherever_it_is_written(orientation):
    image = photograph(24, 16)
    stored = Image.open(io.BytesIO(encoded(image, "JPEG")))
    stored.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="%d"/>' % orientation
    for data in (encoded(image, "JPEG", exif=exif), jpeg_with_segment(image, xmp)):
        np.testing.assert_array_equal(decode_pixels(data), upright)
        with_junk = data[:2] + b"\xff\xfe\0\2" + b"junk" + data[2:]  # after a comment without text
        np.testing.assert_array_equal(decode_pixels(with_junk), upright)


def test_a_jpeg_whose_faults_can_be_mended_is_what_pillow_makes_of_it():
    data = encoded(photograph(32, 32), "JPEG")
    data = data[:-2] + b"extra" + data[-2:]
    with pytest.raises(ValueError, match="extraneous bytes"):
        simplejpeg.decode_jpeg(data)
    np.testing.assert_array_equal(decode_pixels(data), Image.open(io.BytesIO(data)))


def test_sixteen_bit_grays_keep_their_range():
    image = Image.fromarray(np.array([[0, 32_896, 65_535]], np.uint16))
    assert np.asarray(decode_image(encoded(image)))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


def test_grays_bilevel_and_cmyk_become_rgb():
    assert decode_image(encoded(Image.new("L", (2, 2), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert decode_image(encoded(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == (255, 255, 255)
    cyan = decode_image(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95)).getpixel((4, 4))
    np.testing.assert_allclose(cyan, (0, 255, 255), atol=6)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    assert decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((1, 1))[0] > 250


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_truncated_files_are_refused(kind):
    data = encoded(noise(64, 64), kind)
    assert decode_image(data).size == (64, 64)
    for kept in (0, 1, 20, len(data) // 2):
        with pytest.raises(ImageError) as caught:
            decode_image(data[:kept])
        assert str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_picture_is_refused():
    for data in (b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89PNG\r\n\x1a\n" + bytes(100)):
        with pytest.raises(ImageError):
            decode_image(data)


@pytest.mark.filterwarnings("ignore")  # TIFF complains about its tags before it fails
def test_damaged_bytes_never_raise_anything_else():
    rng = generator()
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "ICO"):
        original = encoded(noise(32, 32), kind)
        for _ in range(100):
            data = bytearray(original)
            for place in rng.integers(len(data), size=4):
                data[place] = rng.integers(256)
            with contextlib.suppress(ImageError):
                assert decode_image(bytes(data)).mode == "RGB"


def test_images_too_large_or_too_thin_are_refused_before_their_pixels_are_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="10 x 10 pixels are more than 99"):
        decode_image(encoded_without_load(10, 10))
    monkeypatch.undo()
    assert decode_image(encoded(noise(100, 1))).size == (100, 1)
    with pytest.raises(ImageError, match="101 x 1 pixels: one side is over 100 times the other"):
        decode_image(encoded(noise(101, 1)))


def claiming(kind: str, width: int, height: int) -> bytes:
    """A small image of this kind whose header says that it is larger."""
    data = encoded(noise(8, 8), kind)
    place, layout = {
        "PNG": (data.find(b"IHDR") + 4, ">II"),
        "JPEG": (data.find(b"\xff\xc0") + 5, ">HH"),
        "GIF": (6, "<HH"),
        "BMP": (18, "<ii"),
    }[kind]
    sides = (height, width) if kind == "JPEG" else (width, height)
    changed = bytearray(data)
    struct.pack_into(layout, changed, place, *sides)
    if kind == "PNG":
        struct.pack_into(">I", changed, place + 13, zlib.crc32(changed[place - 4 : place + 13]))
    return bytes(changed)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP"])
@pytest.mark.parametrize("side", [10_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pixels_that_are_only_claimed_get_no_memory(kind, side, monkeypatch):
    monkeypatch.setattr(Image.core, "new", lambda *_: pytest.fail("memory for pixels"))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("memory for pixels"))
    with pytest.raises(ImageError) as caught:
        decode_pixels(claiming(kind, side, side))
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_each_refusal_has_its_reason(kind):
    def reason(image: Image.Image, **limits) -> str:
        for load in (decode_image, decode_pixels):
            with pytest.raises(ImageError) as caught:
                load(encoded(image, kind), **limits)
        return caught.value.reason

    assert reason(noise(30, 9), min_side=10) == "too_small"
    assert reason(noise(9, 40), max_aspect_ratio=4) == "extreme_aspect_ratio"
    assert decode_pixels(encoded(noise(30, 10), kind), min_side=10, max_aspect_ratio=3).shape == (10, 30, 3)
    with pytest.raises(ImageError) as caught:
        decode_pixels(encoded(noise(9, 9), kind)[:40])
    assert caught.value.reason == "undecodable"


def test_an_icon_that_holds_more_pixels_than_its_directory_says_is_refused(monkeypatch):
    data = encoded(noise(64, 64), "ICO", sizes=[(64, 64)]).replace(b"\x40\x40", b"\x08\x08", 1)
    monkeypatch.setattr(images, "MAX_PIXELS", 1_000)
    with pytest.warns(UserWarning, match="expected size"), pytest.raises(ImageError, match="64 x 64 pixels"):
        decode_pixels(data)


def test_an_image_error_survives_pickling_with_its_reason():
    assert ImageError("gone").reason == "undecodable"
    error = pickle.loads(pickle.dumps(ImageError("2 x 2", "too_small")))
    assert (str(error), error.reason) == ("2 x 2", "too_small")


IMAGES = [
    *(encoded(photograph(40, 30), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF")),
    encoded(photograph(40, 30), "JPEG", progressive=True),
    jpeg_with_segment(photograph(40, 30), b"Exif\0\0" + Image.Exif().tobytes()),
]


@st.composite
def damaged_images(draw) -> bytes:
    data = bytearray(draw(st.sampled_from(IMAGES)))
    for place in draw(st.lists(st.integers(0, 8 * len(data) - 1), max_size=8)):
        data[place // 8] ^= 1 << place % 8
    return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))])


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=400, deadline=None)
@given(st.one_of(damaged_images(), st.binary(max_size=200), st.builds(b"\xff\xd8\xff".__add__, st.binary())))
def test_whatever_the_bytes_there_are_pixels_or_an_image_error(data):
    with contextlib.suppress(ImageError):
        pixels = training_pixels(data, 8, generator(), PAPER)
        assert pixels.dtype == np.uint8 and pixels.shape == (8, 8, 3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_image_cut_anywhere_is_refused(data):
    image = data.draw(st.sampled_from(IMAGES))
    with pytest.raises(ImageError):
        # Without the last 20 to 24 bytes, checksums and the end marker, all pixels of a PNG can still be there.
        decode_pixels(image[: data.draw(st.integers(0, len(image) - 32))])


def encoded_without_load(width: int, height: int) -> bytes:
    """A PPM written by hand."""
    return b"P6 %d %d 255\n" % (width, height) + bytes(3 * width * height)


def test_pillows_own_bomb_error_is_an_image_error():
    with pytest.raises(ImageError) as caught:
        decode_image(b"P6 100000 100000 255\n" + bytes(10))
    assert caught.value.reason == "too_large"


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


def test_the_crops_half_pixels_are_rounded_to_even_as_torchvision_rounds_them():
    for extra, left in ((1, 0), (3, 2), (5, 2), (7, 4)):
        image = noise(16 + extra, 16)
        np.testing.assert_array_equal(evaluation_transform(image, 16), np.asarray(image)[:, left : left + 16])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
@pytest.mark.parametrize("shape", [(40, 40), (90, 30), (21, 50), (20, 18)])
@pytest.mark.parametrize(
    ("mode", "resize_size"), [("squash", 0), ("squash", 20), ("longest", 0), ("longest", 12), ("shortest", 24)]
)
def test_training_resizes_as_evaluation_does_and_crops_at_random(mode, resize_size, shape, interpolation):
    """Seen from what evaluation gives of the whole image, each crop of training is a part of it."""
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
        place = min(differences, key=differences.get)
        assert differences[place] < (8 if interpolation == "nearest" else 1.5)
        seen.add(place)
    assert (len(seen) > 1) == (size > 16)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_random_resized_crop_interpolates_as_it_is_told(interpolation):
    image, way = noise(60, 50), Preprocessing(interpolation=interpolation, resize_mode="squash")
    whole = Augmentation(crop_scale=1.0)
    crop = training_transform(image, 16, generator(), whole, preprocessing=way)
    box = images._random_resized_crop(60, 50, generator(), 1.0)
    expected = image.resize((16, 16), Image.Resampling[interpolation.upper()], box)
    assert np.abs(np.int16(np.asarray(expected)) - crop).mean() < 1


def test_without_augmentation_training_is_the_papers_random_crop_and_reaches_every_place():
    image = noise(20, 16)
    pixels = np.asarray(image)
    crops = {pixels[:, left : left + 16].tobytes(): left for left in range(5)}
    rng = generator()
    seen = {crops[training_transform(image, 16, rng, Augmentation()).tobytes()] for _ in range(200)}
    assert seen == set(range(5))


def difference(pixels: np.ndarray, others: np.ndarray) -> tuple[float, int]:
    """The mean and the largest difference, in levels."""
    levels = np.abs(pixels.astype(int) - others.astype(int))
    return levels.mean(), levels.max()


def resized_and_cropped_by_pillow(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    short = min(image.size)
    image = image.resize([int(size * side / short) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (int(rng.integers(side - size + 1)) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("size", [(256, 256), (640, 480), (333, 500), (100, 90), (300, 40), (1999, 1501)])
@pytest.mark.parametrize("resizer", ["cykooz_resizer", "Pillow"])
def test_the_crop_alone_resized_is_what_pillow_makes_of_the_whole_and_then_crops(size, resizer, monkeypatch):
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
def test_an_image_of_the_asked_size_keeps_its_pixels(size):
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
        # Twice 2.5 x 96 pixels, in a crop of half the short side or more.
        assert (mean > 0) == (min(size) >= 480 / (0.475 if crop_scale == 0.3 else 1))


def test_an_image_of_another_kind_is_decoded_whole():
    image = photograph(800, 700)
    np.testing.assert_array_equal(
        training_pixels(encoded(image), 64, generator(), STRONG), training_transform(image, 64, generator(), STRONG)
    )


def test_nothing_is_drawn_for_an_image_that_cannot_be_used():
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
def test_every_crop_lies_in_the_image(size, image_size, crop_scale):
    pixels = np.full((*size, 3), 77, np.uint8)
    cropped = training_transform(pixels, image_size, generator(), Augmentation(crop_scale=crop_scale))
    assert cropped.shape == (image_size, image_size, 3) and (cropped == 77).all()


def test_random_resized_crops_have_torchvisions_areas_ratios_and_places():
    least, side, rng = 0.5, 2_000, generator()
    boxes = np.array([images._random_resized_crop(side, side, rng, least) for _ in range(4_000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, ratios = widths * heights / side**2, widths / heights
    assert boxes.min() >= 0 and boxes.max() <= side and areas.min() >= least - 1e-3
    assert ratios.min() >= 0.75 - 1e-3 and ratios.max() <= 4 / 3 + 1e-3
    # Both uniform at first, the ratio in its logarithm; draws that exceed the image, |log ratio| > -log area, are
    # made again. So an area's density goes with min(log 4/3, -log area).
    grid = np.linspace(least, 1, 10_001)[:-1]
    density = np.minimum(math.log(4 / 3), -np.log(grid))
    mean = (grid * density).sum() / density.sum()
    assert abs(areas.mean() - mean) < 5 * areas.std() / math.sqrt(len(areas))
    assert abs(np.log(ratios).mean()) < 5 * np.log(ratios).std() / math.sqrt(len(ratios))
    places = boxes[:, 0] / np.maximum(1, side - widths)
    assert abs(places.mean() - 0.5) < 5 * math.sqrt(1 / 12 / len(places)) and places.max() > 0.99


def test_an_image_too_long_for_any_random_resized_crop_gives_its_middle():
    assert images._random_resized_crop(300, 30, generator(), 0.9) == (130, 0, 170, 30)
    assert images._random_resized_crop(30, 300, generator(), 0.9) == (0, 130, 30, 170)


@pytest.mark.parametrize("size", [(64, 64), (90, 64), (5, 40), (1, 1)])
@pytest.mark.parametrize("image_size", [8, 33, 48])
def test_training_gives_squares_of_the_asked_size_whatever_the_augmentation(size, image_size):
    rng = generator()
    for augmentation in (PAPER, STRONG, Augmentation(crop_scale=0.5), *EACH_ALONE):
        pixels = training_transform(noise(*size), image_size, rng, augmentation)
        assert pixels.dtype == np.uint8 and pixels.shape == (image_size, image_size, 3)


def test_the_generator_alone_decides():
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
def test_images_smaller_than_the_model_wants_crash_no_process(seed):
    done = subprocess.run([sys.executable, "-c", ENLARGE, str(seed)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout.splitlines()[-1]


def test_a_program_for_printers_is_no_picture():
    with pytest.raises(ImageError, match="not an image, or in an unsupported format"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
