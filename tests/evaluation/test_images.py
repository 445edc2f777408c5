"""Tests how the images and annotations of an evaluation are read."""

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.sources import open_source
from clip_jax.evaluation.images import Annotation, Images, read_annotations


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a/good.png")
    (tmp_path / "a/torn.png").write_bytes((tmp_path / "a/good.png").read_bytes()[:40])
    source = open_source(f"image_folder:{tmp_path}")
    images = Images("folder", source, 8)
    assert images[0].shape == (8, 8, 3)
    with pytest.raises(ValueError, match=r"folder: .*torn\.png: "):
        images[1]


def test_annotations_are_in_the_order_of_the_source():
    source = open_source("emoji:noto/held_out")
    expected = [Annotation([source[index].label], list(source[index].captions)) for index in range(len(source))]
    assert read_annotations("emoji", source) == expected


def test_cached_images_are_decoded_once(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (20, 24)).save(tmp_path / name / f"{number}.png")
    reads = []
    images = Images("folder", open_source(f"image_folder:{tmp_path}"), 16)
    monkeypatch.setattr(images, "_read", lambda row: reads.append(row) or np.zeros((16, 16, 3), np.uint8))
    for _ in range(3):
        list(images)
        list(images.select([3, 1]))
    assert sorted(reads) == list(range(8))
    monkeypatch.setattr("clip_jax.evaluation.images.CACHE_BYTES", 0)
    images, before = Images("folder", open_source(f"image_folder:{tmp_path}"), 16), len(reads)
    monkeypatch.setattr(images, "_read", lambda row: reads.append(row) or np.zeros((16, 16, 3), np.uint8))
    for _ in range(2):
        list(images)
    assert len(reads) == before + 2 * 8
