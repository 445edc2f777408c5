"""Sources give pairs by index, and say what is wrong before anything else happens."""

import json

import msgpack
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from clip_jax.data.emoji.build import captions_of, is_held_out
from clip_jax.data.images import decode_image
from clip_jax.data.sources import EMOJI_FOLDER, PairError, open_source


def test_the_pairs_that_ship_are_whole():
    concepts = json.loads((EMOJI_FOLDER / "concepts.json").read_text())
    assert len(concepts) > 1_850
    held_out = {concept["key"] for concept in concepts if concept["held_out"]}
    assert held_out == {concept["key"] for concept in concepts if is_held_out(concept["key"])}
    assert 0.08 < len(held_out) / len(concepts) < 0.12
    for style in ("noto", "twemoji", "openmoji"):
        for split, keys in (("held_out", held_out), ("train", {c["key"] for c in concepts} - held_out)):
            source = open_source(f"emoji:{style}/{split}")
            assert {source[index].key for index in range(len(source))} == keys


def test_a_shipped_pair_is_a_64_pixel_picture_whose_captions_all_name_it():
    source = open_source("emoji:openmoji/all")
    for index in range(0, len(source), 97):
        pair = source[index]
        image = decode_image(pair.image)
        assert (image.mode, image.size) == ("RGB", (64, 64))
        assert pair.captions[0] == pair.label
        assert all(pair.label in caption for caption in pair.captions)
        assert len(set(pair.captions)) == len(pair.captions) >= 4


def test_no_shipped_concept_is_a_skin_tone_variant():
    for concept in json.loads((EMOJI_FOLDER / "concepts.json").read_text()):
        assert "skin tone" not in concept["name"]
        assert not any(f"1F3F{digit}" in concept["key"].split("-") for digit in "BCDEF")


def test_all_that_ships_stays_below_25_megabytes():
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


def test_a_tsv_is_read_by_its_ending(tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    (tmp_path / "pairs.tsv").write_text("filepath\ttitle\na.png\tone, two\n")
    source = open_source(f"csv:{tmp_path}/pairs.tsv?image=filepath&caption=title")
    assert source[0].captions == ["one, two"]
    assert decode_image(source[0].image).size == (3, 3)


def test_a_missing_picture_of_a_csv_is_a_broken_pair_rather_than_fatal(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,caption\nnone.png,nothing\n")
    source = open_source(f"csv:{tmp_path}/pairs.csv")
    with pytest.raises(PairError, match=r"none\.png"):
        source[0]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (b"not msgpack", "record 0 is damaged"),
        (msgpack.packb({"captions": ["a"]}), "record 0 has no picture in image"),
        (msgpack.packb({"image": "text", "captions": ["a"]}), "must be bytes"),
        (msgpack.packb({"image": b"", "captions": []}), "has no caption"),
        (msgpack.packb({"image": b"", "captions": [3]}), "captions is int, not text"),
    ],
)
def test_a_damaged_record_is_a_broken_pair(tmp_path, record, expected):
    writer = ArrayRecordWriter(str(tmp_path / "pairs"), "group_size:1")
    writer.write(record)
    writer.close()
    with pytest.raises(PairError, match=expected):
        open_source(f"array_record:{tmp_path}/pairs")[0]


def test_a_file_that_is_no_array_record_is_named(tmp_path):
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
def test_a_gap_in_a_csv_is_a_bad_sample(tmp_path, rows, expected):
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


def test_the_fingerprint_tells_sources_apart_and_is_the_same_for_the_same():
    assert open_source("emoji:noto/train").fingerprint() == open_source("emoji:noto/train").fingerprint()
    assert open_source("emoji:noto/train").fingerprint() != open_source("emoji:noto/held_out").fingerprint()
    assert (
        open_source("emoji:noto,twemoji/train").fingerprint() != open_source("emoji:twemoji,noto/train").fingerprint()
    )
