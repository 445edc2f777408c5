"""Every image in a folder that Pillow reads is found; all other files are named."""

import os

import pytest
from shards import captions_or_reasons, image_bytes

from clip_jax.data.images import decode_image, image_suffixes
from clip_jax.data.sources import open_source


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(folder, **files: bytes) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return f"folder:{folder}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\r\n\nthree", ["one", "two", "three"]),
        ("one\u2028still\x85one\x0cand\x0b\x1cmore\ntwo", ["one\u2028still\x85one\x0cand\x0b\x1cmore", "two"]),
        ("one\rstill one\n", ["one\rstill one"]),
        ("\ufeffone", ["one"]),
        (" \n\t\n", "empty_caption"),
        (b"caf\xe9", "damaged_record"),
        ("a\0b", "damaged_record"),
    ],
)
def test_only_a_line_feed_ends_a_caption(tmp_path, text, expected):
    text = text if isinstance(text, bytes) else text.encode()
    source = open_source(write(tmp_path / "f", a__png=image_bytes(1), a__txt=text, b__png=image_bytes(2), b__txt=b"b"))
    assert captions_or_reasons(source) == [expected, ["b"]]


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        *[("tif", "TIFF"), ("TIFF", "TIFF"), ("avif", "AVIF"), ("jfif", "JPEG"), ("jpe", "JPEG"), ("jp2", "JPEG2000")],
        *[("tga", "TGA"), ("ppm", "PPM"), ("ico", "ICO"), ("dib", "DIB"), ("mpo", "MPO"), ("qoi", "QOI")],
    ],
)
def test_every_suffix_of_an_image_is_found(tmp_path, ending, kind):
    name = f"a__{ending}"
    write(tmp_path / "f/class", **{name: image_bytes(1, 16, kind), "a__txt": b"words"})
    for source in (open_source(f"folder:{tmp_path}/f"), open_source(f"image_folder:{tmp_path}/f")):
        assert len(source) == 1
        assert decode_image(source[0].image).size == (16, 16)


def test_suffixes_of_unsupported_formats_are_not_images():
    assert image_suffixes().isdisjoint({".eps", ".pdf", ".mpg", ".wmf", ".h5", ".txt", ".svg", ".heic", ""})


def test_unused_files_are_named_by_their_suffix(tmp_path):
    folder = tmp_path / "f"
    name = write(
        folder, a__png=image_bytes(1), a__TXT=b"a", b__png=image_bytes(2), c__txt=b"c", d__heic=b"x", README=b"x"
    )
    write(folder / "deep", e__heic=b"x", __hidden=b"x")
    os.symlink(tmp_path / "nowhere", folder / "l.png")
    os.symlink(tmp_path, folder / "linked")
    os.mkfifo(folder / "pipe.png")
    source = open_source(name)
    assert captions_or_reasons(source) == [["a"], "empty_caption"]
    [note, _] = source.notes()
    assert note.startswith("not used: 2 files .heic, 2 files without a suffix, 1 file .txt, ")
    for kind in ("broken link", "link to a folder", "pipe, socket or device"):
        assert f"1 x {kind}" in note


def test_an_image_folder_names_files_without_class_and_classes_without_images(tmp_path):
    write(tmp_path / "f", top__png=image_bytes(1))
    write(tmp_path / "f/a", x__png=image_bytes(1), x__txt=b"x")
    (tmp_path / "f/b").mkdir()
    [note] = open_source(f"image_folder:{tmp_path}/f").notes()
    assert note == "not used: 1 file .txt, 1 file .png, 1 x folder b without an image"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "no images below .*, it is empty"),
        ({"a__heic": b"x"}, "only 1 file .heic; supported are"),
        ({"a__png": b"x"}, r"a\.png has no captions: write at least one line to .*a\.txt"),
    ],
)
def test_the_error_for_a_folder_without_pairs_names_its_files(tmp_path, files, expected):
    with pytest.raises(ValueError, match=expected):
        open_source(write(tmp_path / "f", **files))
