"""Tasks from data to result: classes and their names, and the same numbers on any number of devices."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from shards import picture, write_tar

from clip_jax.data.sources import open_source
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.pictures import Pictures, Said, read_said
from clip_jax.evaluation.registry import Task
from clip_jax.evaluation.tasks import Evaluations, Extras, class_numbers
from clip_jax.evaluation.zero_shot import classifier_of
from clip_jax.models.clip import CLIP
from clip_jax.models.presets import CLIPPreset, TextTransformerPreset, VisionTransformerPreset

pytestmark = pytest.mark.usefixtures("quick_compilation")
PRESET = CLIPPreset(
    16,
    VisionTransformerPreset(image_size=16, patch_size=8, width=32, num_layers=1, num_heads=2),
    TextTransformerPreset(width=16, num_layers=1, num_heads=2, context_length=16),
)
COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}


@pytest.fixture(scope="module")
def embedder_on(quick_compilation, mesh_of):
    """A function from a mesh's shape to the same small model on it."""
    model = CLIP(PRESET)
    variables = nn.meta.unbox(model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 16), jnp.int32)))
    return lambda shape: Embedder(model, mesh_of(shape), batch_size=24).with_variables(variables)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """37 pictures in a folder each of three colours, with noise; and half as many for training."""
    root, random = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, counts in (("test", (9, 12, 16)), ("train", (10, 10, 10))):
        for (name, colour), count in zip(COLOURS.items(), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + random.normal(0, 60, (20, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number:02}.png")
    return root


def score(embedder, task, data="", **extras):
    evaluations = Evaluations([task], 16, str(data))
    assert not evaluations.missing and not evaluations.broken, [*evaluations.missing, *evaluations.broken]
    results = evaluations.score(embedder, classifier_of(embedder), "model", "tiny", Extras(**extras))
    assert not results.missing, results.missing
    return results.tasks[0]


def colours_task(**changes):
    values = {"prompts": "", "source": "image_folder:{data}/test", "templates": ("a {} thing", "{}")}
    return Task(**({"name": "colours", "kind": "zero_shot"} | values | changes))


def same(one, other):
    assert one.metrics == pytest.approx(other.metrics, rel=1e-6)
    for name, array in one.arrays.items():
        np.testing.assert_allclose(array, other.arrays[name], rtol=1e-4, err_msg=name)


def test_a_classification_is_the_same_on_one_device_and_on_eight(embedder_on, folders):
    task = colours_task(train="image_folder:{data}/train", pixel_baseline="image_folder:{data}/train")
    one, eight = (
        score(embedder_on(shape), task, folders, baseline=True, synthetic_shift=True, linear_probe=True)
        for shape in ((1, 1), (4, 2))
    )
    same(one, eight)
    assert one.counts == {"images": 37, "classes": 3} and one.class_names == ["blue", "green", "red"]
    np.testing.assert_array_equal(one.arrays["labels"], [0] * 16 + [1] * 12 + [2] * 9)
    assert one.metrics["top_1"] == (one.arrays["best"][:, 0] == one.arrays["labels"]).mean()
    assert one.baseline["top_1"] == 1  # the nearest mean colour
    assert one.chance == {"top_1": 1 / 3, "mean_per_class": 1 / 3}
    assert one.synthetic_shift == eight.synthetic_shift and one.synthetic_shift.keys() > {"blur", "noise"}
    assert one.linear_probe["accuracy"] > 0.9
    assert one.linear_probe["accuracy"] == eight.linear_probe["accuracy"]
    assert one.picture(36).shape == (16, 16, 3) and one.picture(36)[..., 0].mean() > 150


def test_a_retrieval_is_the_same_on_one_device_and_on_eight(embedder_on):
    task = Task("emoji", "retrieval", "emoji:openmoji/held_out", first_caption=True)
    one, eight = (score(embedder_on(shape), task) for shape in ((1, 1), (2, 4)))
    same(one, eight)
    assert one.counts == {"images": 205, "texts": 205}
    assert len(one.texts) == len(one.arrays["shown_texts"]) == 8


def test_without_first_caption_every_caption_is_a_text_of_its_picture_alone(embedder_on):
    task = Task("emoji", "retrieval", "emoji:openmoji/held_out", metric="text_to_image_recall@1")
    result = score(embedder_on((4, 2)), task)
    source = open_source("emoji:openmoji/held_out")
    assert result.counts == {"images": 205, "texts": sum(len(source[index].captions) for index in range(205))}
    assert result.arrays["text_to_image_rank"].shape == (result.counts["texts"],)


def test_several_classes_a_picture_are_scored_as_average_precision(embedder_on, tmp_path):
    random, lines = np.random.default_rng(0), []
    for number in range(21):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        labels = [["cat"], ["dog", "cat"], ["bird"], []][number % 4]
        lines.append(json.dumps({"image": f"{number}.png", "labels": labels, "caption": "x"}))
    (tmp_path / "table.jsonl").write_text("\n".join(lines))
    task = Task(
        "animals",
        "zero_shot",
        "jsonl:{data}/table.jsonl?label=labels",
        class_names=("cat", "dog", "bird"),
        metric="average_precision_11",
    )
    result = score(embedder_on((4, 2)), task, tmp_path)
    assert result.metrics.keys() == {"average_precision_11"} and 0 < result.metrics["average_precision_11"] < 1
    assert result.chance["average_precision_11"] == pytest.approx((6 + 2 * 5 + 5) / 63)


def test_two_classes_have_an_area_under_the_curve(embedder_on, folders):
    task = colours_task(class_names=("red", "blue"), labels=("red", "blue"), other_classes=True, metric="roc_auc")
    result = score(embedder_on((4, 2)), task, folders)
    assert result.counts == {"images": 25, "classes": 2}
    assert 0 <= result.metrics["roc_auc"] <= 1 and result.chance["roc_auc"] == 0.5


def said(*labels):
    return [Said([label], []) for label in labels]


@pytest.mark.parametrize(
    ("found", "names", "labels", "folders", "expected"),
    [
        (said("b", "a", "b"), (), (), False, {"b": 0, "a": 1}),
        (said("dog", "cat"), ("cat", "dog", "bird"), (), False, {"cat": 0, "dog": 1, "bird": 2}),
        (said("2", "0"), ("cat", "dog", "bird"), (), False, {"2": 2, "0": 0}),
        (said("00002", "00001"), ("zero", "one", "two"), (), True, {"00002": 2, "00001": 1}),
        (said("1", "0"), ("cat", "cat"), (), False, {"1": 1, "0": 0}),
        (said("n02", "n01"), ("cat", "dog"), (), True, {"n01": 0, "n02": 1}),
        (said("n02"), ("cat", "dog"), ("n01", "n02"), False, {"n01": 0, "n02": 1}),
    ],
)
def test_classes_are_found_by_label_name_number_or_folder(found, names, labels, folders, expected):
    assert class_numbers(found, names, labels, folders) == expected


@pytest.mark.parametrize(
    ("found", "names", "labels", "folders", "message"),
    [
        (said("0", "7"), ("cat", "dog"), (), False, "labels go up to 7, which needs 8 class names, but there are 2"),
        (said("a", "b", "c"), ("cat", "dog"), (), True, "2 class names for 3 folders"),
        (said("a"), ("cat", "dog"), (), False, "'a' is none of its 2 class names"),
        (said("a"), ("cat", "dog"), ("a",), False, "2 class names for 1 labels"),
        (said("0", "1"), (), (), False, "its classes are numbers; give their class_names"),
        (said("cat"), ("cat", "cat"), (), False, "the class name 'cat' is there twice"),
    ],
)
def test_class_names_that_do_not_go_with_the_labels_are_a_line(found, names, labels, folders, message):
    with pytest.raises(ValueError, match=message):
        class_numbers(found, names, labels, folders)


def test_clip_benchmarks_layout_brings_names_and_templates(embedder_on, tmp_path):
    members = []
    for number in range(6):
        members += [(f"s{number}.png", picture(number)), (f"s{number}.cls", str(number % 3).encode())]
    (tmp_path / "test").mkdir()
    write_tar(tmp_path / "test/0.tar", members)
    (tmp_path / "classnames.txt").write_text("cat\ndog\nbird\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    task = colours_task(source="wds:{data}/test/*.tar?caption=&label=cls", templates=())
    (evaluation,) = Evaluations([task], 16, str(tmp_path)).tasks
    assert evaluation.class_names == ["cat", "dog", "bird"] and evaluation._templates == ("a photo of a {}.",)
    result = score(embedder_on((1, 1)), task, tmp_path)
    np.testing.assert_array_equal(result.arrays["labels"], [0, 1, 2, 0, 1, 2])


def test_numbers_as_labels_in_json_lines_are_labels(embedder_on, tmp_path):
    lines = []
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
        lines.append(json.dumps({"img": f"{number}.png", "label": number % 2, "text": "as Hateful Memes has it"}))
    (tmp_path / "dev.jsonl").write_text("\n".join(lines))
    task = colours_task(
        source="jsonl:{data}/dev.jsonl?image=img&caption=&label=label",
        class_names=("meme", "hateful meme"),
        metric="roc_auc",
    )
    result = score(embedder_on((1, 1)), task, tmp_path)
    np.testing.assert_array_equal(result.arrays["labels"], [0, 1, 0, 1])


def test_a_task_that_fails_leaves_the_others_their_results(embedder_on, folders, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/torn.png").write_bytes(b"no picture")
    torn = colours_task(name="torn", source=f"image_folder:{tmp_path}")
    embedder = embedder_on((4, 2))
    told = []
    results = Evaluations([torn, colours_task()], 16, str(folders)).score(
        embedder, classifier_of(embedder), "model", "tiny", tell=lambda results: told.append(len(results.tasks))
    )
    assert [task.name for task in results.tasks] == ["colours"] and told == [0, 1]
    (failed,) = results.missing
    assert failed.name == "torn" and failed.reason.endswith("torn.png: no picture, or of a format that is not read")


def test_a_probe_that_cannot_be_is_a_note(embedder_on, folders):
    embedder = embedder_on((4, 2))
    assert score(embedder, colours_task(), folders, linear_probe=True).notes == [
        "no linear probe: the task names no training split"
    ]
    task = colours_task(train="image_folder:{data}/nowhere")
    result = score(embedder, task, folders, linear_probe=True)
    assert result.notes == [f"no linear probe: no folder {folders}/nowhere"] and "top_1" in result.metrics


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a/good.png")
    (tmp_path / "a/torn.png").write_bytes((tmp_path / "a/good.png").read_bytes()[:40])
    source = open_source(f"image_folder:{tmp_path}")
    pictures = Pictures("folder", source, 8)
    assert pictures[0].shape == (8, 8, 3)
    with pytest.raises(ValueError, match=r"folder: .*torn\.png: "):
        pictures[1]


def test_what_a_source_says_comes_in_its_order():
    source = open_source("emoji:noto/held_out")
    expected = [Said([source[index].label], list(source[index].captions)) for index in range(len(source))]
    assert read_said("emoji", source) == expected


def test_kept_pictures_are_decoded_once(folders, monkeypatch):
    reads = []
    pictures = Pictures("colours", open_source(f"image_folder:{folders}/test"), 16)
    monkeypatch.setattr(pictures, "_read", lambda row: reads.append(row) or np.zeros((16, 16, 3), np.uint8))
    for _ in range(3):
        list(pictures)
        list(pictures.chosen([3, 1]))
    assert sorted(reads) == list(range(37))
    monkeypatch.setattr("clip_jax.evaluation.pictures.KEPT_BYTES", 0)
    pictures, before = Pictures("colours", open_source(f"image_folder:{folders}/test"), 16), len(reads)
    monkeypatch.setattr(pictures, "_read", lambda row: reads.append(row) or np.zeros((16, 16, 3), np.uint8))
    for _ in range(2):
        list(pictures)
    assert len(reads) == before + 2 * 37


def test_missing_data_is_told_with_the_way_to_get_it(tmp_path):
    task = colours_task(how_to_get="paint them into {data}/test")
    evaluations = Evaluations([task], 16, str(tmp_path))
    assert not evaluations
    (missing,) = evaluations.missing
    assert missing.reason == f"no folder {tmp_path}/test" and missing.how_to_get == f"paint them into {tmp_path}/test"


def test_embeddings_that_are_not_finite_are_a_line(embedder_on, folders, mesh_of):
    model = CLIP(PRESET)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 16), jnp.int32))
    variables = nn.meta.unbox(variables)
    variables["params"]["vision"]["projection"]["kernel"] *= np.nan
    embedder = Embedder(model, mesh_of((4, 2)), batch_size=24).with_variables(variables)
    evaluations = Evaluations([colours_task()], 16, str(folders))
    (failed,) = evaluations.score(embedder, lambda names, templates: np.eye(3, 16), "model", "tiny").missing
    assert failed.reason.startswith("37 of 37 embeddings are not finite")


def test_the_mean_of_top_1_and_top_5_is_there_where_it_is_asked_for(embedder_on, tmp_path):
    for number in range(7):
        (tmp_path / f"c{number}").mkdir()
        Image.new("RGB", (16, 16), (number * 30, 9, 200)).save(tmp_path / f"c{number}/1.png")
    task = colours_task(source=f"image_folder:{tmp_path}", metric="mean_top_1_top_5")
    result = score(embedder_on((1, 1)), task)
    assert result.metrics["mean_top_1_top_5"] == (result.metrics["top_1"] + result.metrics["top_5"]) / 2
    assert result.chance["mean_top_1_top_5"] == pytest.approx((1 / 7 + 5 / 7) / 2)
