"""Tests tasks from data to results: classes and their names, and equal numbers on any number of devices."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from shards import image_bytes, write_tar

from clip_jax.data.sources import open_source
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.evaluations import Evaluations
from clip_jax.evaluation.measuring import Extras
from clip_jax.evaluation.metrics import average_precision_11
from clip_jax.evaluation.task import Task
from clip_jax.evaluation.zero_shot import classifier_of
from clip_jax.models.clip import CLIP
from clip_jax.models.presets import CLIPPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.models.towers.vision_transformer import VisionTransformerPreset

PRESET = CLIPPreset(
    16,
    VisionTransformerPreset(image_size=16, patch_size=8, width=32, num_layers=1, num_heads=2),
    TextTransformerPreset(width=16, num_layers=1, num_heads=2, context_length=16),
)
COLORS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}


@pytest.fixture(scope="module")
def embedder_on(mesh_of):
    """A function from the shape of a mesh to a small model on it, always with the same parameters."""
    model = CLIP(PRESET)
    variables = nn.meta.unbox(model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 16), jnp.int32)))
    return functools.cache(lambda shape: Embedder(model, mesh_of(shape), batch_size=24).set_variables(variables))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """37 noisy images in three folders, one for each color, and 30 for training."""
    root, random = tmp_path_factory.mktemp("colors"), np.random.default_rng(0)
    for split, counts in (("test", (9, 12, 16)), ("train", (10, 10, 10))):
        for (name, color), count in zip(COLORS.items(), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(color) + random.normal(0, 60, (20, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number:02}.png")
    return root


def score(embedder, task, data="", **extras):
    evaluations = Evaluations([task], 16, str(data))
    assert not evaluations.missing and not evaluations.broken, [*evaluations.missing, *evaluations.broken]
    results = evaluations.score(embedder, classifier_of(embedder), "model", "tiny", Extras(**extras))
    assert not results.missing, results.missing
    return results.tasks[0]


def colors_task(**changes):
    values = {"prompts": "", "source": "image_folder:{data}/test", "templates": ("a {} thing", "{}")}
    return Task(**({"name": "colors", "kind": "zero_shot"} | values | changes))


def same(one, other):
    assert one.metrics == pytest.approx(other.metrics, rel=1e-6)
    for name, array in one.arrays.items():
        np.testing.assert_allclose(array, other.arrays[name], rtol=1e-4, err_msg=name)


def test_a_classification_is_the_same_on_one_device_and_on_eight(embedder_on, folders):
    source, note = "image_folder:{data}/train", "a sentence"
    task = colors_task(train=source, pixel_baseline=source, note=note)
    one, eight = (
        score(embedder_on(shape), task, folders, baseline=True, synthetic_shift=True, linear_probe=True)
        for shape in ((1, 1), (4, 2))
    )
    same(one, eight)
    assert one.counts == {"images": 37, "classes": 3} and one.class_names == ["blue", "green", "red"]
    np.testing.assert_array_equal(one.arrays["labels"], [0] * 16 + [1] * 12 + [2] * 9)
    assert one.metrics["top_1"] == (one.arrays["best"][:, 0] == one.arrays["labels"]).mean()
    assert one.notes[0] == note
    assert one.baseline["top_1"] == 1  # nearest mean color
    assert one.chance == {"top_1": 1 / 3, "mean_per_class": 1 / 3}
    assert one.synthetic_shift == eight.synthetic_shift and one.synthetic_shift.keys() > {"blur", "noise"}
    assert one.linear_probe["accuracy"] > 0.9
    assert one.linear_probe["accuracy"] == eight.linear_probe["accuracy"]
    assert one.image_at(36).shape == (16, 16, 3) and one.image_at(36)[..., 0].mean() > 150


def test_a_retrieval_is_the_same_on_one_device_and_on_eight(embedder_on):
    task = Task("emoji", "retrieval", "emoji:openmoji/held_out", first_caption=True)
    one, eight = (score(embedder_on(shape), task) for shape in ((1, 1), (2, 4)))
    same(one, eight)
    assert one.counts == {"images": 205, "texts": 205}
    assert len(one.texts) == len(one.arrays["shown_texts"]) == 8


def test_without_first_caption_each_caption_is_a_text_of_one_image(embedder_on):
    task = Task("emoji", "retrieval", "emoji:openmoji/held_out", metric="text_to_image_recall@1")
    result = score(embedder_on((4, 2)), task)
    source = open_source("emoji:openmoji/held_out")
    assert result.counts == {"images": 205, "texts": sum(len(source[index].captions) for index in range(205))}
    assert result.arrays["text_to_image_rank"].shape == (result.counts["texts"],)


def test_images_with_several_classes_are_scored_by_average_precision(embedder_on, tmp_path):
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
    # With so few images, interpolation raises a random ranking from 1/3 to about 1/2.
    targets = np.array([[n % 4 < 2, n % 4 == 1, n % 4 == 2] for n in range(21)])
    random = np.random.default_rng(7)
    drawn = np.mean([average_precision_11(random.random((21, 3)), targets) for _ in range(200)])
    assert result.chance["average_precision_11"] == pytest.approx(drawn, abs=0.05) and drawn > 0.45
    # Equal scores: the share of images of the class, averaged over the classes.
    assert result.largest_class["average_precision_11"] == pytest.approx((11 + 5 + 5) / 63)
    assert result.notes[-1] == "5 of 21 images have no class"
    more = dataclasses.replace(task, class_names=(*task.class_names, "fish"))
    assert broken(more, tmp_path) == (
        "average_precision_11 needs images of every class, and 1 of 4 have none, such as 'fish'; leave them out of "
        "class_names"
    )


def test_two_classes_have_an_area_under_the_curve(embedder_on, folders):
    task = colors_task(class_names=("red", "blue"), labels=("red", "blue"), other_classes=True, metric="roc_auc")
    result = score(embedder_on((4, 2)), task, folders)
    assert result.counts == {"images": 25, "classes": 2}
    assert 0 <= result.metrics["roc_auc"] <= 1 and result.chance["roc_auc"] == 0.5


def broken(task, data):
    """The reason why a task cannot be scored."""
    evaluations = Evaluations([task], 16, str(data))
    assert not evaluations.tasks and not evaluations.missing
    return evaluations.broken[0].reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"class_names": ("red", "green", "bleu")},
            "1 of its 3 classes match none of the task's 3 class names: 'blue' (did you",
        ),
        ({"class_names": ("red", "green")}, "1 of its 3 classes match none of the task's 2 class names: 'blue'"),
        (
            {"class_names": ("x", "y", "z")},
            "3 of its 3 classes match none of the task's 3 class names: 'blue', 'green', 'red'",
        ),
        (
            {"class_names": ("a", "b", "c"), "labels": ("red", "green", "blu")},
            "match none of the task's 3 labels: 'blue'",
        ),
        ({"class_names": ("red", "green", "blue", " ")}, "class_names has an empty entry at index 3"),
        ({"class_names": ("red", "green", "blue", "blue")}, "'blue' could be 2 of the classes"),
        ({"class_names": ("a", "b", "c"), "labels": ("red", "green", "red")}, "the label 'red' occurs twice"),
        (
            {"class_names": ("x", "y"), "other_classes": True},
            "3 of its 3 classes match none of the task's 2 class names",
        ),
        (
            {"pixel_baseline": "digits:test"},
            "pixel_baseline=digits:test: 10 of its 10 classes match none of the task's 3",
        ),
        (
            {"class_names": ("red", "blue"), "labels": ("red", "yellow"), "other_classes": True, "metric": "roc_auc"},
            "roc_auc needs images of every class, and 1 of 2 have none, such as 'blue'",
        ),
    ],
)
def test_labels_that_do_not_match_the_class_names_are_refused_by_name(folders, changes, message):
    assert message in broken(colors_task(**changes), folders)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("labels", ("a",)),
        ("train", "digits:train"),
        ("note", "a sentence"),
        ("other_classes", True),
        ("templates", ("{}",)),
    ],
)
def test_a_field_without_effect_is_refused(key, value):
    with pytest.raises(ValueError, match=f"{key} has no effect with kind='retrieval'"):
        Task("pairs", "retrieval", "emoji:openmoji/held_out", **{key: value})
    with pytest.raises(ValueError, match="first_caption has no effect with kind='zero_shot'"):
        colors_task(first_caption=True)
    with pytest.raises(ValueError, match=r"validation has no effect .* without train"):
        colors_task(validation="digits:train")
    with pytest.raises(ValueError, match=r"pixel_baseline has no effect .*average_precision_11"):
        colors_task(pixel_baseline="digits:train", metric="average_precision_11")


def test_a_note_reports_a_folder_without_images(embedder_on, folders, tmp_path):
    for name in ("red", "green", "violet"):
        (tmp_path / name).mkdir()
    for name in ("red", "green"):
        (tmp_path / name / "1.png").write_bytes((folders / "train" / name / "00.png").read_bytes())
    (tmp_path / "violet" / "1.txt").write_text("no image")
    result = score(embedder_on((1, 1)), colors_task(source=f"image_folder:{tmp_path}"))
    assert result.class_names == ["green", "red"]
    assert result.notes == ["1 folders have no image that can be read and are not classes, such as 'violet'"]


def test_a_note_reports_a_baseline_of_the_tasks_own_images(embedder_on, folders):
    own = "image_folder:{data}/test"
    notes = score(embedder_on((1, 1)), colors_task(pixel_baseline=own), folders, baseline=True).notes
    assert notes == ["pixel_baseline: these are the task's own images, so its numbers do not hold for other images"]


def test_other_names_in_another_order_give_the_same_numbers(embedder_on, folders):
    embedder = embedder_on((1, 1))
    expected = score(embedder, colors_task(class_names=("red", "green", "blue")), folders)
    other = score(embedder, colors_task(class_names=("blue", "red", "green")), folders)
    assert other.metrics == pytest.approx(expected.metrics)
    marked = score(embedder, colors_task(class_names=("Blue", "RED", "green")), folders)
    assert marked.metrics == pytest.approx(expected.metrics)  # the tokenizer ignores case
    assert marked.notes == ["matched without case, spaces and punctuation: 'blue' is 'Blue', 'red' is 'RED'"]
    more = score(embedder, colors_task(class_names=("blue", "red", "green", "violet")), folders)
    assert more.notes == ["1 of 4 classes have no image and remain possible answers: 'violet'"]


def test_notes_report_other_classes_of_a_baseline_and_a_probe(embedder_on, folders, tmp_path):
    for split, names in (("test", "red green blue"), ("train", "red green yellow")):
        for name in names.split():
            (tmp_path / split / name).mkdir(parents=True)
            source = folders / "train" / name.replace("yellow", "blue")
            for file in list(source.iterdir())[:6]:
                (tmp_path / split / name / file.name).write_bytes(file.read_bytes())
    train = "image_folder:{data}/train"
    task = colors_task(pixel_baseline=train, train=train)
    result = score(embedder_on((1, 1)), task, tmp_path, baseline=True, linear_probe=True)
    lacks = "1 of 3 classes have no image and cannot be its answers: 'blue'"
    left_out = "left out: 6 of 18 records, of 1 classes that are not the task's: 'yellow'"
    assert result.notes == [
        f"pixel_baseline: {lacks}",
        f"pixel_baseline: {left_out}",
        f"linear probe, train: {lacks}",
        f"linear probe, train: {left_out}",
    ]
    assert result.baseline == {"top_1": 2 / 3, "mean_per_class": 2 / 3}  # blue cannot be its answer
    assert result.linear_probe["accuracy"] == pytest.approx(2 / 3)


def test_a_train_split_of_unknown_classes_is_refused_before_anything_is_embedded(folders):
    (task,) = Evaluations([colors_task(train="digits:train")], 16, str(folders)).tasks
    with pytest.raises(
        ValueError, match="train=digits:train: 10 of its 10 classes match none of the task's 3 class names"
    ):
        task.score(None, None, Extras(linear_probe=True))


def test_a_probe_with_too_few_images_leaves_the_zero_shot_result(embedder_on, folders, tmp_path):
    for name in COLORS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes((folders / "train" / name / "00.png").read_bytes())
    result = score(embedder_on((1, 1)), colors_task(train=f"image_folder:{tmp_path}"), folders, linear_probe=True)
    assert "top_1" in result.metrics and not result.linear_probe
    assert result.notes == [
        "no linear probe: train: no class has 3 examples or more, so none can be set aside to choose C; give a "
        "validation split"
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"top_1": 16 / 37, "mean_per_class": 1 / 3}),
        ({"metric": "mean_per_class"}, {"top_1": 16 / 37, "mean_per_class": 1 / 3}),
        (
            {"class_names": ("red", "blue"), "other_classes": True, "metric": "roc_auc"},
            {"top_1": 16 / 25, "mean_per_class": 1 / 2, "roc_auc": 0.5},
        ),
        (
            {"class_names": ("red", "green", "blue", "a", "b", "c"), "metric": "mean_top_1_top_5"},
            {"top_1": 16 / 37, "top_5": 1, "mean_per_class": 1 / 3, "mean_top_1_top_5": (16 / 37 + 1) / 2},
        ),
    ],
)
def test_the_largest_class_has_a_value_in_each_metric(embedder_on, folders, changes, expected):
    result = score(embedder_on((1, 1)), colors_task(**changes), folders)
    assert result.largest_class == pytest.approx(expected)
    assert result.largest_class.keys() == result.metrics.keys() - {"calibration_error"}


def test_rows_of_a_table_with_the_same_image_are_joined(embedder_on, tmp_path):
    captions, rows = {}, ["image,caption"]
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(number))
        captions[number] = [f"caption {number} {way}" for way in "ab"]
        rows += [f"{number}.png,{caption}" for caption in captions[number]]
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    lines = [json.dumps({"image": f"{number}.png", "caption": texts}) for number, texts in captions.items()]
    (tmp_path / "images.jsonl").write_text("\n".join(lines))
    by_row, by_image = (
        score(embedder_on((1, 1)), Task("pairs", "retrieval", f"{kind}:{tmp_path}/{name}"))
        for kind, name in (("csv", "rows.csv"), ("jsonl", "images.jsonl"))
    )
    assert by_row.metrics == by_image.metrics and by_row.counts == {"images": 6, "texts": 12}
    assert by_row.notes == ["6 of 12 records name an image file again; their captions are joined"]


def test_copies_and_equal_texts_are_counted(embedder_on, tmp_path):
    for name, number in (("cat", 1), ("dog", 2)):
        (tmp_path / name).mkdir()
        for copy in "ab":
            (tmp_path / name / f"{copy}.png").write_bytes(image_bytes(number))
    (tmp_path / "dog/c.png").write_bytes(image_bytes(1))
    source = f"image_folder:{tmp_path}"
    result = score(embedder_on((1, 1)), colors_task(source=source, class_names=("cat", "dog", "DOG")))
    assert result.notes == [
        "1 of 3 classes have no image and remain possible answers: 'DOG'",
        "3 of 5 images have the same embedding as an earlier one",
        "3 images have the same embedding as an image of another class",
        "2 of 3 classes have the same text embedding as a class of another name, so images of these classes count as "
        "wrong; the tokenizer ignores case and cuts long texts",
    ]
    result = score(embedder_on((1, 1)), Task("pairs", "retrieval", source))
    assert result.notes == [
        f"5 of 5 {what}; such a tie counts as wrong"
        for what in (
            "images have the same embedding as an image with another text",
            "texts have the same embedding as a text of another image",
        )
    ]
    labels = ("cat", "dog", "n03")
    result = score(embedder_on((1, 1)), colors_task(source=source, class_names=("pet", "hound", "pet"), labels=labels))
    assert "1 class names belong to several classes each, such as 'pet': the first is the answer, and" in " ".join(
        result.notes
    )


def test_names_and_templates_are_read_from_clip_benchmarks_layout(embedder_on, tmp_path):
    members = []
    for number in range(6):
        members += [(f"s{number}.png", image_bytes(number)), (f"s{number}.cls", str(number % 3).encode())]
    (tmp_path / "test").mkdir()
    write_tar(tmp_path / "test/0.tar", members)
    (tmp_path / "classnames.txt").write_text("cat\ndog\nbird\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    task = colors_task(source="wds:{data}/test/*.tar?caption=&label=cls", templates=())
    (evaluation,) = Evaluations([task], 16, str(tmp_path)).tasks
    assert evaluation.class_names == ["cat", "dog", "bird"] and evaluation._templates == ("a photo of a {}.",)
    result = score(embedder_on((1, 1)), task, tmp_path)
    np.testing.assert_array_equal(result.arrays["labels"], [0, 1, 2, 0, 1, 2])


def test_numbers_as_labels_in_json_lines_are_labels(embedder_on, tmp_path):
    lines = []
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(number))
        lines.append(json.dumps({"img": f"{number}.png", "label": number % 2, "text": "as Hateful Memes has it"}))
    (tmp_path / "dev.jsonl").write_text("\n".join(lines))
    task = colors_task(
        source="jsonl:{data}/dev.jsonl?image=img&caption=&label=label",
        class_names=("meme", "hateful meme"),
        metric="roc_auc",
    )
    result = score(embedder_on((1, 1)), task, tmp_path)
    np.testing.assert_array_equal(result.arrays["labels"], [0, 1, 0, 1])


def test_other_tasks_are_scored_when_one_fails(embedder_on, folders, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/torn.png").write_bytes(b"no image")
    torn = colors_task(name="torn", source=f"image_folder:{tmp_path}")
    embedder = embedder_on((4, 2))
    seen = []
    results = Evaluations([torn, colors_task()], 16, str(folders)).score(
        embedder, classifier_of(embedder), "model", "tiny", on_result=lambda results: seen.append(len(results.tasks))
    )
    assert [task.name for task in results.tasks] == ["colors"] and seen == [0, 1]
    (failed,) = results.missing
    assert failed.name == "torn" and failed.reason.endswith("torn.png: not an image, or in an unsupported format")


def test_a_note_says_why_there_is_no_probe(embedder_on, folders):
    embedder = embedder_on((4, 2))
    assert score(embedder, colors_task(), folders, linear_probe=True).notes == [
        "no linear probe: the task has no training split"
    ]
    task = colors_task(train="image_folder:{data}/nowhere")
    result = score(embedder, task, folders, linear_probe=True)
    assert result.notes == [f"no linear probe: train: no folder {folders}/nowhere"] and "top_1" in result.metrics


def test_missing_data_is_reported_with_how_to_get_it(tmp_path):
    task = colors_task(how_to_get="paint them into {data}/test")
    evaluations = Evaluations([task], 16, str(tmp_path))
    assert not evaluations
    (missing,) = evaluations.missing
    assert missing.reason == f"no folder {tmp_path}/test" and missing.how_to_get == f"paint them into {tmp_path}/test"


def test_embeddings_that_are_not_finite_are_reported_in_one_line(embedder_on, folders, mesh_of):
    model = CLIP(PRESET)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 16), jnp.int32))
    variables = nn.meta.unbox(variables)
    variables["params"]["vision"]["projection"]["kernel"] *= np.nan
    embedder = Embedder(model, mesh_of((4, 2)), batch_size=24).set_variables(variables)
    evaluations = Evaluations([colors_task()], 16, str(folders))
    (failed,) = evaluations.score(embedder, lambda names, templates: np.eye(3, 16), "model", "tiny").missing
    assert failed.reason.startswith("37 of 37 embeddings are not finite")


def test_the_mean_of_top_1_and_top_5_is_computed_if_it_is_the_metric(embedder_on, tmp_path):
    for number in range(7):
        (tmp_path / f"c{number}").mkdir()
        Image.new("RGB", (16, 16), (number * 30, 9, 200)).save(tmp_path / f"c{number}/1.png")
    task = colors_task(source=f"image_folder:{tmp_path}", metric="mean_top_1_top_5")
    result = score(embedder_on((1, 1)), task)
    assert result.metrics["mean_top_1_top_5"] == (result.metrics["top_1"] + result.metrics["top_5"]) / 2
    assert result.chance["mean_top_1_top_5"] == pytest.approx((1 / 7 + 5 / 7) / 2)
