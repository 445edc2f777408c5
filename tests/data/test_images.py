"""Decoding equals Pillow's, and images that cannot be used are refused with a reason."""

import contextlib
import io
import pickle
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from drawings import PAPER, encoded, generator, noise, photograph, training_pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from clip_jax.data import images
from clip_jax.data.images import (
    ImageError,
    decode_image,
    decode_pixels,
)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_composited_on_white(mode):
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
def test_a_plain_jpeg_has_pillows_pixels_without_pillow(mode, size, monkeypatch):
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


def test_a_jpeg_with_extraneous_bytes_is_decoded_as_pillow_does():
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


def test_data_that_are_not_an_image_are_refused():
    for data in (b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89PNG\r\n\x1a\n" + bytes(100)):
        with pytest.raises(ImageError):
            decode_image(data)


@pytest.mark.filterwarnings("ignore")  # TIFF complains about its tags before it fails
def test_damaged_bytes_only_raise_image_errors():
    rng = generator()
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "ICO"):
        original = encoded(noise(32, 32), kind)
        for _ in range(100):
            data = bytearray(original)
            for offset in rng.integers(len(data), size=4):
                data[offset] = rng.integers(256)
            with contextlib.suppress(ImageError):
                assert decode_image(bytes(data)).mode == "RGB"


def test_too_large_or_too_thin_images_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="10 x 10 pixels are more than 99"):
        decode_image(black_ppm(10, 10))
    monkeypatch.undo()
    assert decode_image(encoded(noise(100, 1))).size == (100, 1)
    with pytest.raises(ImageError, match="101 x 1 pixels: one side is over 100 times the other"):
        decode_image(encoded(noise(101, 1)))


def claiming(kind: str, width: int, height: int) -> bytes:
    """A small image whose header states a larger size."""
    data = encoded(noise(8, 8), kind)
    offset, layout = {
        "PNG": (data.find(b"IHDR") + 4, ">II"),
        "JPEG": (data.find(b"\xff\xc0") + 5, ">HH"),
        "GIF": (6, "<HH"),
        "BMP": (18, "<ii"),
    }[kind]
    sides = (height, width) if kind == "JPEG" else (width, height)
    changed = bytearray(data)
    struct.pack_into(layout, changed, offset, *sides)
    if kind == "PNG":
        struct.pack_into(">I", changed, offset + 13, zlib.crc32(changed[offset - 4 : offset + 13]))
    return bytes(changed)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP"])
@pytest.mark.parametrize("side", [10_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_no_memory_is_allocated_for_a_size_that_is_only_in_the_header(kind, side, monkeypatch):
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


def test_an_icon_with_more_pixels_than_its_directory_states_is_refused(monkeypatch):
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
    for offset in draw(st.lists(st.integers(0, 8 * len(data) - 1), max_size=8)):
        data[offset // 8] ^= 1 << offset % 8
    return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))])


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=400, deadline=None)
@given(st.one_of(damaged_images(), st.binary(max_size=200), st.builds(b"\xff\xd8\xff".__add__, st.binary())))
def test_any_bytes_give_pixels_or_an_image_error(data):
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


def black_ppm(width: int, height: int) -> bytes:
    return b"P6 %d %d 255\n" % (width, height) + bytes(3 * width * height)


def test_pillows_decompression_bomb_error_is_an_image_error():
    with pytest.raises(ImageError) as caught:
        decode_image(b"P6 100000 100000 255\n" + bytes(10))
    assert caught.value.reason == "too_large"


def test_postscript_is_refused():
    with pytest.raises(ImageError, match="not an image, or in an unsupported format"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
