"""Tests that tasks, prompts, class names and published numbers are consistent with each other."""

import dataclasses
import json
import re
from importlib import resources

import pytest

from clip_jax.config import load_config_file
from clip_jax.data.sources.array_record import EMOJI_STYLES
from clip_jax.evaluation.labels import match_classes, plain
from clip_jax.evaluation.registry import TASKS
from clip_jax.evaluation.task import KINDS, METRICS

FOLDER = resources.files("clip_jax.evaluation")
PROMPTS = {
    entry.name.removesuffix(".json"): json.loads(entry.read_text(encoding="utf-8"))
    for entry in (FOLDER / "prompts").iterdir()
}
PUBLISHED = json.loads((FOLDER / "published.json").read_text(encoding="utf-8"))
CLASSES = {
    "food101": 101,
    "cifar10": 10,
    "cifar100": 100,
    "birdsnap": 500,
    "sun397": 397,
    "stanford_cars": 196,
    "fgvc_aircraft": 100,
    "voc2007": 20,
    "dtd": 47,
    "oxford_pets": 37,
    "caltech101": 102,
    "flowers102": 102,
    "mnist": 10,
    "fer2013": 7,
    "stl10": 10,
    "eurosat": 10,
    "resisc45": 45,
    "gtsrb": 43,
    "kitti_distance": 4,
    "country211": 211,
    "pcam": 2,
    "ucf101": 101,
    "kinetics700": 700,
    "clevr_counts": 8,
    "hateful_memes": 2,
    "rendered_sst2": 2,
    "imagenet": 1000,
}
SHIFTED = {"imagenet_a": 200, "imagenet_r": 200, "objectnet": 113, "imagenet_vid": 30, "youtube_bb": 23}
SAME_NAME = {"imagenet": {"missile", "sunglasses"}}  # two classes each, which OpenAI's names do not distinguish


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_prompts_are_well_formed(name):
    prompts = PROMPTS[name]
    assert set(prompts) <= {"source", "templates", "class_names", "labels"}
    assert prompts["source"]
    assert prompts["templates"]
    assert all(template.count("{}") == 1 for template in prompts["templates"])
    names, labels = prompts.get("class_names", []), prompts.get("labels", [])
    assert {each for each in names if names.count(each) > 1} <= SAME_NAME.get(name, set())
    assert all(each.strip() == each != "" for each in names + labels)
    if labels:
        assert len(labels) == len(set(labels)) == len(names)


@pytest.mark.parametrize(("name", "count"), (CLASSES | SHIFTED | {"digits": 10}).items())
def test_every_class_has_a_name(name, count):
    assert len(PROMPTS[name]["class_names"]) == count


def test_imagenets_labels_are_its_wordnet_ids_in_order():
    names = dict(zip(PROMPTS["imagenet"]["labels"], PROMPTS["imagenet"]["class_names"], strict=True))
    assert list(names) == sorted(names)
    assert names["n01440764"] == "tench" and names["n15075141"] == "toilet paper"
    for part in ("imagenet_a", "imagenet_r"):
        prompts = PROMPTS[part]
        assert prompts["class_names"] == [names[label] for label in prompts["labels"]]


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_no_two_classes_are_equal_without_case_and_punctuation(name):
    keys = PROMPTS[name].get("labels") or PROMPTS[name].get("class_names", [])
    plain_keys = [plain(key) for key in dict.fromkeys(keys)]
    assert all(plain_keys) and len(set(plain_keys)) == len(plain_keys)


def test_torchvisions_folders_of_kinetics_match_the_class_names():
    names = PROMPTS["kinetics700"]["class_names"]
    folders = [re.sub("['()]", "", name.replace(" ", "_")) for name in names]
    matching = match_classes(sorted(folders), names)
    assert [matching.index_of[folder] for folder in folders] == list(range(700))


def test_rows_are_well_formed():
    assert len({task.name for task in TASKS}) == len(TASKS)
    groups = {group for task in TASKS for group in task.groups}
    assert groups == {"paper", "vtab", "shift", "retrieval", "open_clipart", "ships", "emoji_left_out"}
    assert not groups & {task.name for task in TASKS}  # --tasks takes both
    for task in TASKS:
        assert task.kind in KINDS and task.metric in METRICS[task.kind], task.name
        assert task.source and task.title, task.name
        assert task.how_to_get or {"ships", "emoji_left_out"} & set(task.groups), task.name
        assert "{here}" not in task.how_to_get, task.name
        if task.kind == "zero_shot":
            assert task.prompts in PROMPTS, task.name
        for field in dataclasses.astuple(task):
            assert not isinstance(field, str) or "\n" not in field, task.name


def test_baselines_of_emoji_have_the_training_styles_of_the_quickstart_and_no_others():
    source = load_config_file("configs/quickstart.py").data.source
    trained = set(source.removeprefix("emoji:").removesuffix("/train").split(","))
    assert trained == set(EMOJI_STYLES) - {"openmoji"}
    given = {task.name: task.pixel_baseline for task in TASKS if task.pixel_baseline and task.prompts == "emoji"}
    styles = {name: set(source.removeprefix("emoji:").partition("/")[0].split(",")) for name, source in given.items()}
    assert styles == {"emoji_unseen_style": trained, "emoji_unseen_style_trained": trained} | {
        f"emoji_left_out_{style}": trained - {style} for style in trained
    }
    # With all concepts, the baseline has data that the model has not; a note states this.
    more = [name for name, source in given.items() if not source.endswith("/train")]
    assert more == [task.name for task in TASKS if "the model is not" in task.note] == ["emoji_unseen_style"]


def test_the_papers_data_sets_and_its_shifts_are_there():
    assert [task.name for task in TASKS if "paper" in task.groups] == list(CLASSES)
    assert sum("shift" in task.groups for task in TASKS) == 8
    others = {task.name: task.metric for task in TASKS if "paper" in task.groups and task.metric != "top_1"}
    mean = dict.fromkeys(("fgvc_aircraft", "oxford_pets", "caltech101", "flowers102"), "mean_per_class")
    by_itself = {"voc2007": "average_precision_11", "hateful_memes": "roc_auc", "kinetics700": "mean_top_1_top_5"}
    assert others == mean | by_itself


@pytest.mark.parametrize("section", sorted(PUBLISHED))
def test_published_numbers_are_percentages_with_one_for_each_model(section):
    models = PUBLISHED[section]["models"]
    assert PUBLISHED[section]["source"] and len(set(models)) == len(models)
    for task, row in PUBLISHED[section]["tasks"].items():
        assert len(row) == len(models), task
        numbers = [number for number in row if number is not None]
        assert numbers and all(0 <= number <= 100 for number in numbers), task
        if section in ("zero_shot", "shift"):
            assert len(numbers) == 9, task


def test_rows_and_published_numbers_name_each_other():
    named = {task.published for task in TASKS if task.published}
    assert named == {task for section in PUBLISHED.values() for task in section["tasks"]}
