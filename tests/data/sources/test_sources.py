"""Sources return pairs by index, and report mistakes when they are opened."""

import json

import msgpack
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from clip_jax.data.emoji.build import PACKAGES, captions_of, is_held_out
from clip_jax.data.emoji.iconify import Names, drawings, icon_names
from clip_jax.data.images import decode_image
from clip_jax.data.sources import EMOJI_FOLDER, PairError, open_source
from clip_jax.data.sources.array_record import EMOJI_STYLES

CONCEPTS = json.loads((EMOJI_FOLDER / "concepts.json").read_text(encoding="utf-8"))
HELD_OUT = {concept["key"] for concept in CONCEPTS if concept["held_out"]}
STYLES = {  # training pairs, held-out pairs, pixels per side, words in the license's row
    "noto": (1_701, 205, 64, "Apache-2.0"),
    "twemoji": (1_701, 205, 64, "CC-BY 4.0"),
    "openmoji": (1_701, 205, 64, "CC BY-SA 4.0"),
    "fluent_flat": (1_425, 169, 36, "MIT"),
    "fluent_color": (1_421, 169, 36, "MIT"),
    "emojione": (1_209, 162, 36, "CC BY 4.0"),
    "fxemoji": (773, 107, 36, "CC BY 4.0"),
    "noto_v1": (1_091, 142, 36, "Apache-2.0"),
}


def test_the_concepts_in_the_package():
    assert len(CONCEPTS) == 1_906 and len(HELD_OUT) == 205
    assert {concept["key"] for concept in CONCEPTS if is_held_out(concept["key"])} == HELD_OUT
    assert set(STYLES) == set(EMOJI_STYLES)
    assert {path.name for path in EMOJI_FOLDER.glob("*.array_record")} == {
        f"{style}-{split}.array_record" for style in STYLES for split in ("train", "held_out")
    }


@pytest.mark.parametrize("style", STYLES)
def test_a_style_in_the_package(style):
    train, held_out, pixels, _ = STYLES[style]
    names = {concept["key"]: concept["name"] for concept in CONCEPTS}
    for split, count in (("train", train), ("held_out", held_out)):
        source = open_source(f"emoji:{style}/{split}")
        pairs = [source[index] for index in range(len(source))]
        keys = [pair.key for pair in pairs]
        assert len(keys) == len(set(keys)) == count
        assert set(keys) <= (HELD_OUT if split == "held_out" else set(names) - HELD_OUT)
        assert keys == [key for key in names if key in set(keys)]  # the order of concepts.json
        for pair in pairs:
            image = decode_image(pair.image)
            assert (image.mode, image.size) == ("RGB", (pixels, pixels)), pair.key
            assert any(low != high for low, high in image.getextrema()), f"{pair.key} is blank"
            assert pair.captions[0] == pair.label == names[pair.key]


@pytest.mark.parametrize("style", STYLES)
def test_the_license_of_a_style_is_stated_and_in_the_package(style):
    readme = (EMOJI_FOLDER / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if line.startswith(f"| `{style}-*`")]
    _, _, package, license_name, file, _ = (cell.strip() for cell in row.split("|"))
    name, version = package.split()
    assert PACKAGES[name.strip("`")] == version
    assert license_name == STYLES[style][3]
    text = (EMOJI_FOLDER / file.strip("`")).read_text(encoding="utf-8")
    words = {"Apache-2.0": "Version 2.0", "MIT": "MIT License", "CC BY-SA 4.0": "Attribution-ShareAlike 4.0"}
    assert words.get(license_name, "Attribution 4.0 International") in text


@pytest.mark.parametrize(
    ("style", "key", "icon"),
    [
        ("emojione", "1F1EB-1F1F7", "flag-for-france"),
        ("emojione", "0023-20E3", "keycap-pound"),
        ("noto-v1", "1F604", "grinning-face-with-smiling-eyes"),  # Unicode has another emoji of this name
        ("fxemoji", "1F4A1", "lightbulb"),
        ("fxemoji", "1F48E", "gem"),
        ("fxemoji", "1F408", "catside"),
    ],
)
def test_icons_are_matched_by_name(tmp_path, style, key, icon):
    assert icon in _drawn(tmp_path, [icon], style)[key]


def test_icons_are_matched_by_code_points_where_the_package_has_them(tmp_path):
    assert _drawn(tmp_path, ["a", "b"], "fluent_flat", {"1f48e": "a", "2764-fe0f": "b", "1f595-1f3fb": "b"}).keys() == {
        "1F48E",
        "2764",
    }


def test_two_icons_of_one_concept_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="noto_v1: gem-stone and gem are both 1F48E"):
        _drawn(tmp_path, ["gem-stone", "gem"], "noto_v1")


def _drawn(folder, icons, style, chars=None):
    names = Names(
        {concept["key"]: concept["name"] for concept in CONCEPTS},
        {"1F48E": "GEM", "1F601": "GRINNING FACE WITH SMILING EYES"},
    )
    listed = {name: {"body": f"<path id='{name}'/>"} for name in [*icons, *icon_names(style)]}
    (folder / "icons.json").write_text(json.dumps({"icons": listed}))
    (folder / "chars.json").write_text(json.dumps(chars or {}))
    return drawings(folder, style, names)


def test_no_concept_is_a_skin_tone_variant():
    for concept in json.loads((EMOJI_FOLDER / "concepts.json").read_text()):
        assert "skin tone" not in concept["name"]
        assert not any(f"1F3F{digit}" in concept["key"].split("-") for digit in "BCDEF")


def test_the_package_is_smaller_than_25_megabytes():
    assert sum(path.stat().st_size for path in EMOJI_FOLDER.iterdir() if path.is_file()) < 25e6


def test_captions_are_made_of_name_and_keywords():
    captions = captions_of("red apple", ["apple", "fruit", "health", "red", "ripe"])
    assert captions[0] == "red apple"
    assert "red apple, fruit" in captions
    assert not any(caption.endswith(", apple") for caption in captions)


def test_several_styles_are_one_source():
    both, noto = open_source("emoji:noto,twemoji/train"), open_source("emoji:noto/train")
    assert len(both) == 2 * len(noto)
    assert both[len(noto)].key == noto[0].key
    assert both[len(noto)].image != noto[0].image


def test_a_tsv_is_recognized_by_its_suffix(tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    (tmp_path / "pairs.tsv").write_text("filepath\ttitle\na.png\tone, two\n")
    source = open_source(f"csv:{tmp_path}/pairs.tsv?image=filepath&caption=title")
    assert source[0].captions == ["one, two"]
    assert decode_image(source[0].image).size == (3, 3)


def test_a_missing_image_of_a_csv_is_a_bad_sample(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,caption\nnone.png,nothing\n")
    source = open_source(f"csv:{tmp_path}/pairs.csv")
    with pytest.raises(PairError, match=r"none\.png"):
        source[0]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (b"not msgpack", "record 0 is damaged"),
        (msgpack.packb({"captions": ["a"]}), "record 0 has no image in image"),
        (msgpack.packb({"image": "text", "captions": ["a"]}), "must be bytes"),
        (msgpack.packb({"image": b"", "captions": []}), "has no caption"),
        (msgpack.packb({"image": b"", "captions": [3]}), "captions is int, not text"),
    ],
)
def test_a_damaged_record_is_a_bad_sample(tmp_path, record, expected):
    writer = ArrayRecordWriter(str(tmp_path / "pairs"), "group_size:1")
    writer.write(record)
    writer.close()
    with pytest.raises(PairError, match=expected):
        open_source(f"array_record:{tmp_path}/pairs")[0]


def test_a_file_that_is_not_an_array_record_is_named(tmp_path):
    (tmp_path / "pairs").write_bytes(b"something else" * 100)
    with pytest.raises(ValueError, match=r"not ArrayRecord files: .*pairs"):
        open_source(f"array_record:{tmp_path}/pairs")


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    (tmp_path / "pairs.csv").write_bytes("\ufeffimage,caption\na.png,words\n".encode())
    assert len(open_source(f"csv:{tmp_path}/pairs.csv")) == 1


def test_a_header_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "pairs.csv").write_bytes("image,caf\xe9\na.png,words\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"pairs\.csv, line 1: not UTF-8"):
        open_source(f"csv:{tmp_path}/pairs.csv")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("image,caption\na.png,\n", "line 2 has no caption"),
        ("image,caption\n \t,a\n", "line 2: the image is empty"),
    ],
)
def test_a_missing_value_in_a_csv_is_a_bad_sample(tmp_path, rows, expected):
    (tmp_path / "pairs.csv").write_text(rows)
    with pytest.raises(PairError, match=expected):
        open_source(f"csv:{tmp_path}/pairs.csv")[0]


def test_a_csv_without_rows_is_refused(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,caption\n")
    with pytest.raises(ValueError, match="has no rows"):
        open_source(f"csv:{tmp_path}/pairs.csv")


def test_an_unknown_option_of_a_csv_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no option 'separator', only image, caption"):
        open_source(f"csv:{tmp_path}/pairs.csv?separator=;")


def test_fingerprints_distinguish_sources_and_are_reproducible():
    assert open_source("emoji:noto/train").fingerprint() == open_source("emoji:noto/train").fingerprint()
    assert open_source("emoji:noto/train").fingerprint() != open_source("emoji:noto/held_out").fingerprint()
    assert (
        open_source("emoji:noto,twemoji/train").fingerprint() != open_source("emoji:twemoji,noto/train").fingerprint()
    )
