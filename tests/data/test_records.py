"""A conversion can be interrupted anywhere without changing its shards, which have each usable pair once."""

import hashlib
import io
import json
import os
import pathlib

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax.data import merging, records, shards
from clip_jax.data.records import Settings, WriteError, write_records
from clip_jax.data.sources import Pair, PairError, open_source


def image_bytes(width: int = 4, height: int = 4, kind: str = "PNG", color: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (color, 0, 0)).save(stream, kind)
    return stream.getvalue()


IMAGE = image_bytes()


class Listed:
    """A source of the given pairs. None is a damaged record."""

    def __init__(self, pairs: list[Pair | None], name: str = "listed"):
        self._pairs, self._name = pairs, name

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Pair:
        if self._pairs[index] is None:
            raise PairError(f"record {index} is damaged", "damaged_record")
        return self._pairs[index]

    def fingerprint(self) -> str:
        return self._name


def pairs_of(folder: pathlib.Path) -> list[Pair]:
    source = open_source(f"array_record:{folder}/pairs-*")
    return [source[index]._replace(proportions=()) for index in range(len(source))]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ten_pairs() -> Listed:
    """Ten records. 0, 1, 4, 6 and 9 are usable."""
    good = [
        Pair(image_bytes(color=index), [f"number {index}", "a number"], f"key {index}", "number") for index in range(10)
    ]
    pairs = [*good[:2], None, Pair(b"broken", ["a caption"], "broken"), *good[4:]]
    pairs[5] = Pair(IMAGE, [" ", "\n"], "blank")
    pairs[7] = pairs[1]._replace(captions=["again"], image=IMAGE)
    pairs[8] = pairs[6]._replace(captions=["again"], image=IMAGE)
    return Listed(pairs)


def test_the_good_pairs_can_be_read_back(tmp_path):
    source = ten_pairs()
    manifest = write_records(source, "ten", tmp_path / "out", Settings(pairs_per_shard=4, license="CC0"))
    assert pairs_of(tmp_path / "out") == [source[index] for index in (0, 1, 4, 6, 9)]
    assert manifest["pairs"] == 5 and manifest["captions"] == 10
    assert manifest["image_bytes"] == sum(len(source[index].image) for index in (0, 1, 4, 6, 9))
    assert manifest["bad_samples"] == {"damaged_record": 1, "duplicate_key": 2, "empty_caption": 1, "undecodable": 1}
    assert manifest["license"] == "CC0"
    assert manifest["conversion"]["source"] == "ten" and manifest["conversion"]["fingerprint"] == "listed"
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == manifest
    assert [shard["pairs"] for shard in manifest["shards"]] == [2, 2, 1]
    for shard in manifest["shards"]:
        data = (tmp_path / "out" / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    bad = [json.loads(line) for line in (tmp_path / "out/bad_samples.jsonl").read_text().splitlines()]
    assert [(one["record"], one["key"]) for one in bad] == [
        (2, "record 2"),
        (3, "broken"),
        (5, "blank"),
        (7, "key 1"),
        (8, "key 6"),
    ]
    assert not (tmp_path / "out/parts").exists()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=12), st.integers(1, 5))
def test_pairs_with_equal_key_and_image_are_merged_and_others_with_the_key_left_out(
    tmp_path_factory, drawn, pairs_per_shard
):
    folder = tmp_path_factory.mktemp("drawn")
    images = [b"broken", IMAGE, image_bytes(color=9)]
    pairs = [Pair(images[which], [f"position {position}"], str(key)) for position, (key, which) in enumerate(drawn)]
    expected: dict[str, Pair] = {}
    for pair in pairs:
        first = expected.get(pair.key)
        if pair.image == b"broken" or (first and first.image != pair.image):
            continue
        expected[pair.key] = first._replace(captions=[*first.captions, *pair.captions]) if first else pair
    write = lambda: write_records(Listed(pairs), "drawn", folder, Settings(pairs_per_shard))  # noqa: E731
    if not expected:
        with pytest.raises(WriteError, match="none of the"):
            write()
        return
    manifest = write()
    assert pairs_of(folder) == list(expected.values())
    assert manifest["captions"] == sum(len(pair.captions) for pair in expected.values())
    assert manifest["pairs"] + manifest["merged"] + sum(manifest["bad_samples"].values()) == len(pairs)


def test_rows_of_one_caption_each_become_one_record_per_image(tmp_path):
    """COCO's captions are often stored so, with the rows of an image together or far apart."""
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(color=number))
    rows = [f"{number}.png,caption {turn} of {number}\n" for turn in range(5) for number in range(4)]
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(rows) + rows[0])
    source = f"csv:{tmp_path}/pairs.csv"
    manifest = write_records(open_source(source), source, tmp_path / "out", Settings(pairs_per_shard=3))
    assert [pair.captions for pair in pairs_of(tmp_path / "out")] == [
        [f"caption {turn} of {number}" for turn in range(5)] for number in range(4)
    ]
    assert (manifest["pairs"], manifest["merged"], manifest["bad_samples"]) == (4, 17, {})


def test_merged_pairs_keep_proportions_and_classes():
    pairs = [
        Pair(IMAGE, ["a", "b"], "key", "cat", [3.0, 1.0]),
        Pair(IMAGE, ["b", "c"], "key", "dog\ncat"),
    ]
    merged = merging.merge(pairs)
    assert (merged.captions, merged.proportions, merged.label) == (["a", "b", "c"], [3.0, 1.5, 0.5], "cat\ndog")


class Killed(BaseException):
    """Simulates a signal at a chosen moment. tests/test_prepare.py sends real signals."""


def test_a_kill_before_or_after_any_rename_changes_nothing(tmp_path, monkeypatch):
    undisturbed = tmp_path / "undisturbed"
    write_records(ten_pairs(), "ten", undisturbed, Settings(pairs_per_shard=3))
    replace, ended = os.replace, 0
    for moment in range(100):
        folder = tmp_path / str(moment)
        renames = 0

        def replace_or_end(old, new, moment=moment):
            nonlocal renames
            if renames == moment / 2:
                raise Killed
            replace(old, new)
            if renames == (moment - 1) / 2:
                raise Killed
            renames += 1

        monkeypatch.setattr(os, "replace", replace_or_end)
        try:
            write_records(ten_pairs(), "ten", folder, Settings(pairs_per_shard=3))
            break
        except Killed:
            ended += 1
        finally:
            monkeypatch.setattr(os, "replace", replace)
        if (folder / "parts").is_dir():
            (folder / "parts/.unfinished-12345-0-pairs-00001.array_record").write_bytes(b"what a killed process leaves")
        write_records(ten_pairs(), "ten", folder, Settings(pairs_per_shard=3))
        assert contents(folder) == contents(undisturbed), moment
    # Before and after: the job; four shards and notes; one again for its duplicates; the list; the manifest.
    assert ended == 2 * (1 + 8 + 2 + 1 + 1)


def test_complete_shards_are_not_written_again(tmp_path, monkeypatch):
    source, drawn = ten_pairs(), []

    class Counting(Listed):
        def __getitem__(self, index):
            drawn.append(index)
            if index == 6 and drawn.count(0) == 1 and drawn.count(6) == 1:
                raise Killed
            return source[index]

    counting = Counting([None] * 10)
    with pytest.raises(Killed):
        write_records(counting, "ten", tmp_path, Settings(pairs_per_shard=5))
    drawn.append("again")
    write_records(counting, "ten", tmp_path, Settings(pairs_per_shard=5))
    assert 0 not in drawn[drawn.index("again") :]


@pytest.mark.parametrize("size", [100, 1_000_000])
def test_a_shard_of_another_size_is_written_again(tmp_path, size):
    with pytest.raises(Killed):
        write_records(ten_pairs(), "ten", tmp_path / "cut", Settings(pairs_per_shard=4), progress=end_when_done)
    shard = tmp_path / "cut/pairs-00000.array_record"
    os.truncate(shard, size)
    write_records(ten_pairs(), "ten", tmp_path / "cut", Settings(pairs_per_shard=4))
    write_records(ten_pairs(), "ten", tmp_path / "whole", Settings(pairs_per_shard=4))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def end_when_done(done: int, total: int) -> None:
    if done == total:
        raise Killed


def test_a_finished_folder_is_not_changed(tmp_path):
    settings = Settings(pairs_per_shard=4)
    manifest = write_records(ten_pairs(), "ten", tmp_path, settings)
    (tmp_path / "parts").mkdir()  # killed after the manifest
    assert write_records(Listed([None] * 10), "ten", tmp_path, settings) == manifest
    assert not (tmp_path / "parts").exists()


def test_progress_reports_all_records(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PROGRESS_EVERY", 0.0)
    seen = []
    write_records(
        ten_pairs(), "ten", tmp_path, Settings(pairs_per_shard=5), progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(done, 10) for done in range(11)] + [(done, 5) for done in range(6)]


@pytest.mark.parametrize("finished", [True, False])
def test_another_conversion_into_the_same_folder_is_refused(tmp_path, finished):
    def write(source=None, name="ten", progress=lambda done, total: None, **changes):
        write_records(source or ten_pairs(), name, tmp_path, Settings(**{"pairs_per_shard": 4} | changes), 1, progress)

    if finished:
        write()
    else:
        with pytest.raises(Killed):
            write(progress=end_when_done)
    with pytest.raises(ValueError, match=r"pairs_per_shard was 4 and is 5.*choose another folder"):
        write(pairs_per_shard=5)
    with pytest.raises(ValueError, match="license was '' and is 'CC0'"):
        write(license="CC0")
    with pytest.raises(ValueError, match="source was 'ten' and is 'eleven'"):
        write(name="eleven")
    with pytest.raises(ValueError, match="fingerprint was 'listed' and is 'other'"):
        write(source=Listed([None] * 10, "other"))
    write()


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("two years")
    with pytest.raises(ValueError, match="holds other files"):
        write_records(ten_pairs(), "ten", tmp_path, Settings())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is .*; choose a new folder"):
        write_records(ten_pairs(), "ten", tmp_path, Settings())


def test_a_source_without_usable_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing has no pairs"):
        write_records(Listed([]), "nothing", tmp_path / "a", Settings())
    assert not (tmp_path / "a").exists()
    with pytest.raises(WriteError, match="none of the 3 pairs of bad can be used: damaged_record 3"):
        write_records(Listed([None] * 3), "bad", tmp_path / "b", Settings())
    assert not (tmp_path / "b/manifest.json").exists()


def test_a_shard_without_a_usable_pair_has_no_file(tmp_path):
    source = Listed([None, None, Pair(IMAGE, ["one"], "one")])
    manifest = write_records(source, "late", tmp_path, Settings(pairs_per_shard=2))
    assert [shard["name"] for shard in manifest["shards"]] == ["pairs-00001.array_record"]
    assert sorted(contents(tmp_path)) == ["bad_samples.jsonl", "manifest.json", "pairs-00001.array_record"]


def test_larger_images_become_jpegs_and_others_are_unchanged(tmp_path):
    sizes = [(90, 45), (45, 90), (20, 300), (30, 30), (31, 31)]
    pairs = [Pair(image_bytes(*size), ["an image"], str(size)) for size in sizes]
    write_records(Listed(pairs), "sizes", tmp_path, Settings(image_size=30))
    written = pairs_of(tmp_path)
    shown = [Image.open(io.BytesIO(pair.image)) for pair in written]
    assert [image.size for image in shown] == [(60, 30), (30, 60), (20, 300), (30, 30), (30, 30)]
    assert [image.format for image in shown] == ["JPEG", "JPEG", "PNG", "PNG", "JPEG"]
    assert [written[index].image for index in (2, 3)] == [pairs[index].image for index in (2, 3)]


def test_quality_sets_the_size_of_the_jpegs(tmp_path):
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    stream = io.BytesIO()
    noise.save(stream, "PNG")
    source = Listed([Pair(stream.getvalue(), ["noise"], "noise")])
    sizes = [
        write_records(source, "noise", tmp_path / str(quality), Settings(image_size=32, quality=quality))["image_bytes"]
        for quality in (30, 95)
    ]
    assert sizes[0] < sizes[1] < len(stream.getvalue())


def test_removing_blank_captions_removes_their_proportions():
    pair = Pair(IMAGE, ["first", " ", "third"], "key", proportions=[1, 2, 3])
    record = msgpack.unpackb(shards.pack(shards.checked(pair, Settings())))
    assert (record["captions"], record["weights"]) == (["first", "third"], [1.0, 3.0])


def test_half_a_character_is_a_bad_sample(tmp_path):
    source = Listed([Pair(IMAGE, ["fine"], "a"), Pair(IMAGE, ["\ud83d"], "b"), Pair(IMAGE, ["key"], "\ud83d")])
    manifest = write_records(source, "halves", tmp_path, Settings())
    assert manifest["pairs"] == 1
    assert manifest["bad_samples"] == {"damaged_record": 2}
    assert len((tmp_path / "bad_samples.jsonl").read_text(encoding="utf-8").splitlines()) == 2
