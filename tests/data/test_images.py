"""Pictures in, pixels out: Pillow and hand-computed pixels are the reference, every picture is made here."""

import contextlib
import dataclasses
import io
import math

import numpy as np
import pytest
from PIL import Image, ImageOps

from clip_jax.data import images
from clip_jax.data.images import (
    Augmentation,
    ImageError,
    augment,
    change_colors,
    decode_image,
    draw_outlines,
    evaluation_transform,
    training_transform,
)

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
    Augmentation(**{field.name: getattr(STRONG, field.name) and max(1.0, getattr(STRONG, field.name))})
    for field in dataclasses.fields(Augmentation)
]


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def drawing(size: int = 32) -> Image.Image:
    """A red square on white: something whose edges, colour and place can be told."""
    image = Image.new("RGB", (size, size), "white")
    image.paste((220, 30, 40), (size // 4, size // 4, size // 2, size // 2))
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


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


def test_a_transparent_colour_of_an_opaque_mode_becomes_white():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 8, 7))
    assert np.asarray(decode_image(encoded(image, transparency=(1, 2, 3)))).tolist() == [[[255] * 3, [9, 8, 7]]]


def test_a_palette_without_transparency_keeps_its_colours():
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


def test_sixteen_bit_greys_keep_their_range():
    image = Image.fromarray(np.array([[0, 32_896, 65_535]], np.uint16))
    assert np.asarray(decode_image(encoded(image)))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


def test_greys_bilevel_and_cmyk_become_rgb():
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


def test_pictures_too_large_or_too_thin_are_refused_before_their_pixels_are_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="10 x 10 pixels are more than 99"):
        decode_image(encoded_without_load(10, 10))
    monkeypatch.undo()
    assert decode_image(encoded(noise(100, 1))).size == (100, 1)
    with pytest.raises(ImageError, match="101 x 1 pixels"):
        decode_image(encoded(noise(101, 1)))


def encoded_without_load(width: int, height: int) -> bytes:
    """A PPM written by hand."""
    return b"P6 %d %d 255\n" % (width, height) + bytes(3 * width * height)


def test_pillows_own_bomb_error_is_an_image_error():
    with pytest.raises(ImageError):
        decode_image(b"P6 100000 100000 255\n" + bytes(10))


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


def test_without_augmentation_training_is_the_papers_random_crop_and_reaches_every_place():
    image = noise(20, 16)
    pixels = np.asarray(image)
    crops = {pixels[:, left : left + 16].tobytes(): left for left in range(5)}
    rng = generator()
    seen = {crops[training_transform(image, 16, rng, Augmentation()).tobytes()] for _ in range(200)}
    assert seen == set(range(5))


def test_without_augmentation_a_square_picture_is_only_resized():
    image = noise(64, 64)
    np.testing.assert_array_equal(
        training_transform(image, 48, generator(), Augmentation()), evaluation_transform(image, 48)
    )


@pytest.mark.parametrize("size", [(64, 64), (90, 64), (5, 40), (1, 1)])
@pytest.mark.parametrize("image_size", [8, 33, 48])
def test_training_gives_squares_of_the_asked_size_whatever_the_augmentation(size, image_size):
    rng = generator()
    for augmentation in (Augmentation(), STRONG, *EACH_ALONE):
        pixels = training_transform(noise(*size), image_size, rng, augmentation)
        assert pixels.dtype == np.uint8 and pixels.shape == (image_size, image_size, 3)


def test_the_generator_alone_decides():
    def several(seed):
        rng = generator(seed)
        return [training_transform(drawing(), 32, rng, STRONG) for _ in range(20)]

    np.testing.assert_array_equal(several(1), several(1))
    assert (np.array(several(1)) != np.array(several(2))).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("augmentation", EACH_ALONE, ids=lambda it: next(k for k, v in vars(it).items() if v))
def test_each_augmentation_alone_changes_the_picture_and_leaves_the_original(augmentation):
    image = drawing()
    before = image.tobytes()
    rng = generator()
    assert any(augment(image, rng, augmentation).tobytes() != before for _ in range(5))
    assert image.tobytes() == before


@pytest.mark.parametrize("name", ["flip", "grayscale", "outline", "line_drawing", "erasing"])
def test_probabilities_are_kept(name):
    image, rng = drawing(), generator()
    changed = sum(augment(image, rng, Augmentation(**{name: 0.3})).tobytes() != image.tobytes() for _ in range(1000))
    assert abs(changed - 300) < 5 * math.sqrt(1000 * 0.3 * 0.7)


def test_a_certain_flip_mirrors():
    image = noise(16, 16)
    assert augment(image, generator(), Augmentation(flip=1.0)) == ImageOps.mirror(image)


def test_a_shape_of_no_strength_moves_nothing():
    image = noise(48, 48)
    assert images.change_shape(image, generator(), Augmentation()) == image


def test_translation_moves_by_its_bound_at_most_and_fills_in_white():
    dot = Image.new("RGB", (64, 64), "white")
    dot.putpixel((32, 32), (0, 0, 0))
    rng, reached = generator(), 0.0
    for _ in range(300):
        rows, columns = np.nonzero(255 - np.asarray(augment(dot, rng, Augmentation(translation=0.25)))[..., 0])
        offset = max(abs(rows - 32).max(), abs(columns - 32).max())
        reached = max(reached, offset)
    assert 14 <= reached <= 17
    black = Image.new("RGB", (64, 64))
    moved = np.asarray(augment(black, generator(), Augmentation(translation=0.25)))
    assert set(np.unique(moved)) == {0, 255}


def test_zoom_goes_both_ways_between_its_bounds():
    rng = generator()
    areas = [
        (np.asarray(augment(drawing(64), rng, Augmentation(zoom=0.5)))[..., 1] < 128).sum() / 16**2 for _ in range(300)
    ]
    assert 1 / 1.5**2 * 0.85 < min(areas) < 0.6 and 1.8 < max(areas) < 1.5**2 * 1.15


def test_rotation_turns_by_its_bound_at_most():
    line = Image.new("RGB", (65, 65), "white")
    line.paste((0, 0, 0), (40, 32, 60, 33))
    rng, angles = generator(), []
    for _ in range(300):
        rows, columns = np.nonzero(np.asarray(augment(line, rng, Augmentation(rotation=20)))[..., 0] < 128)
        angles.append(math.degrees(math.atan2((rows - 32).mean(), (columns - 32).mean())))
    assert -22 < min(angles) < -15 and 15 < max(angles) < 22


def test_grey_levels_survive_hue_and_saturation_and_colours_do_not():
    rng = generator()
    for _ in range(20):
        change = Augmentation(hue=180, saturation=1.0)
        for level in (0, 100, 255):
            pixel = change_colors(Image.new("RGB", (1, 1), (level,) * 3), rng, change).getpixel((0, 0))
            np.testing.assert_allclose(pixel, level, atol=1)


def test_a_hue_of_a_third_of_the_circle_exchanges_the_channels():
    rotated = np.array((10.0, 60.0, 200.0)) @ images._hue_rotation(120).T
    np.testing.assert_allclose(rotated, (200, 10, 60), atol=1e-9)


def test_grayscale_weighs_channels_as_pillow_does():
    image = noise(16, 16)
    gray = np.asarray(augment(image, generator(), Augmentation(grayscale=1.0))).astype(int)
    np.testing.assert_allclose(gray, np.asarray(image.convert("L").convert("RGB")), atol=1)


def test_tint_colours_white_and_keeps_black():
    tinted = augment(Image.new("RGB", (2, 2), "white"), generator(), Augmentation(tint=0.5)).getpixel((0, 0))
    assert len(set(tinted)) == 3 and min(tinted) >= 127
    assert augment(Image.new("RGB", (2, 2)), generator(), Augmentation(tint=0.5)).getpixel((0, 0)) == (0, 0, 0)


def test_outlines_are_black_where_colours_meet_and_nowhere_else():
    image = drawing()
    lines = np.asarray(draw_outlines(image, Image.new("RGB", image.size, "white")))
    expected = np.full((32, 32), 255)
    expected[8, 8:16] = expected[16, 8:16] = expected[8:16, 8] = expected[8:16, 16] = 0
    np.testing.assert_array_equal(lines[..., 0], expected)
    outlined = np.asarray(draw_outlines(image, image))
    np.testing.assert_array_equal(outlined, np.where(expected[..., None] == 0, 0, np.asarray(image)))


def test_soft_shading_draws_no_outline():
    shading = Image.fromarray(np.arange(0, 240, 8, np.uint8)[None, :, None].repeat(30, 0).repeat(3, 2))
    assert draw_outlines(shading, shading) == shading


def test_erasing_covers_one_rectangle_of_one_colour():
    image = Image.new("RGB", (40, 40), "white")
    rng = generator()
    for _ in range(50):
        erased = np.asarray(augment(image, rng, Augmentation(erasing=1.0)))
        rows, columns = np.nonzero((erased != 255).any(axis=-1))
        box = erased[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box == box[0, 0]).all() and 4 <= box.shape[0] <= 20 and 5 <= box.shape[1] <= 20
