"""Sources whose records have classes: folders, Karpathy's annotations, digits, groups, and labels as captions."""

import json

import numpy as np
import pytest
from PIL import Image
from shards import image_bytes, write_tar

from clip_jax.data.images import decode_image
from clip_jax.data.sources import open_source


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_an_image_folder_has_one_class_per_folder_in_order(tmp_path):
    for name in ("b/2.png", "b/1.jpg", "a/deep/3.png", "c/note.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(image_bytes(1))
    source = open_source(f"image_folder:{tmp_path}/data?template=a photo of a {{}}")
    assert [(pair.label, pair.key.rpartition("data/")[2]) for pair in map(source.__getitem__, range(3))] == [
        ("a", "a/deep/3.png"),
        ("b", "b/1.jpg"),
        ("b", "b/2.png"),
    ]
    assert source[0].captions == ["a photo of a a"]
    before = source.fingerprint()
    (tmp_path / "data/b/3.png").write_bytes(image_bytes(2))
    assert open_source(f"image_folder:{tmp_path}/data?template=a photo of a {{}}").fingerprint() != before


@pytest.mark.parametrize(("made", "expected"), [("", "has no folders"), ("a", "no images below")])
def test_an_empty_image_folder_is_refused(tmp_path, made, expected):
    (tmp_path / "data" / made).mkdir(parents=True)
    with pytest.raises(ValueError, match=expected):
        open_source(f"image_folder:{tmp_path}/data")


def write_karpathy(folder):
    entries = [
        {"filename": "1.png", "split": "test", "sentences": [{"raw": "one"}, {"raw": "a one"}]},
        {"filename": "2.png", "split": "train", "sentences": [{"raw": "two"}]},
        {"filename": "3.png", "filepath": "deep", "split": "test", "sentences": [{"raw": "three"}]},
    ]
    (folder / "images/deep").mkdir(parents=True)
    for number, name in ((1, "1.png"), (2, "2.png"), (3, "deep/3.png")):
        (folder / "images" / name).write_bytes(image_bytes(number))
    (folder / "dataset.json").write_text(json.dumps({"images": entries}))


def test_karpathys_annotations_give_the_images_of_a_split_with_all_sentences(tmp_path):
    write_karpathy(tmp_path)
    name = f"karpathy:{tmp_path}/dataset.json?images={tmp_path}/images"
    source = open_source(f"{name}&split=test")
    assert [source[index].captions for index in range(len(source))] == [["one", "a one"], ["three"]]
    assert decode_image(source[1].image).getpixel((0, 0))[0] == 3
    assert len(open_source(name)) == 3
    with pytest.raises(ValueError, match="has no images of the split 'dev'"):
        open_source(f"{name}&split=dev")
    (tmp_path / "dataset.json").write_text('{"photos": []}')
    with pytest.raises(ValueError, match="not Karpathy's JSON of images with sentences: KeyError"):
        open_source(name)


def test_the_digits_are_the_halves_of_scikit_learns():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    data, train, test = load_digits(), open_source("digits:train"), open_source("digits:test")
    assert (len(train), len(test)) == (898, 899)
    labels = [source[index].label for source in (train, test) for index in range(len(source))]
    assert labels == [str(label) for label in data.target]
    pixels = np.array(decode_image(test[0].image))[..., 0]
    np.testing.assert_allclose(255 - pixels, data.images[898] * 255 / 16, atol=0.5)
    with pytest.raises(ValueError, match="the splits are train and test"):
        open_source("digits:all")


def test_emoji_have_groups():
    source = open_source("emoji:openmoji/all?label=group")
    assert len({source[index].label for index in range(0, len(source), 7)}) == 9
    assert source[0].label == "smileys-emotion"
    assert open_source("emoji:openmoji/all")[0].captions == source[0].captions
    with pytest.raises(ValueError, match="the only option is label=group"):
        open_source("emoji:openmoji/all?label=key")


def test_clip_benchmarks_webdatasets_have_a_number_as_class(tmp_path):
    members = []
    for number in range(4):
        members += [(f"s{number}.webp", image_bytes(number, kind="WEBP")), (f"s{number}.cls", str(number % 2).encode())]
    write_tar(tmp_path / "0.tar", members)
    source = open_source(f"wds:{tmp_path}/0.tar?caption=&label=cls")
    assert [(source[index].label, source[index].captions) for index in range(4)] == [
        ("0", ["0"]),
        ("1", ["1"]),
        ("0", ["0"]),
        ("1", ["1"]),
    ]


def test_several_classes_are_one_per_line(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    row = {"image": "1.png", "labels": ["cat", "black dog"], "caption": "x"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    assert open_source(f"jsonl:{tmp_path}/t.jsonl?label=labels")[0].label == "cat\nblack dog"
