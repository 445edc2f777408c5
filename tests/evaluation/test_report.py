"""Tests the HTML page of a report: its contents, that it is valid, and that it needs no other file."""

import base64
import io
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from etils import epath
from PIL import Image

from clip_jax.evaluation.provenance import Provenance, commit_of, provenance
from clip_jax.evaluation.report import load_published, write_report
from clip_jax.evaluation.report.page import percent, title_of
from clip_jax.evaluation.results import MissingTask, Results, TaskResult

ODD = ["plain", "<b>bold</b> & co", 'a "quoted" $x$ name', "grün ≈ 狗", *(f"class {n}" for n in range(4, 12))]
MODELS = ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"]
SHIFTS = {"sketches": -0.3, "art": -0.2}
STANDARD = [f"standard {n}" for n in range(12)]
ON_IMAGENET = np.linspace(55, 85, len(STANDARD))
PUBLISHED = {
    "zero_shot": {
        "source": "a table",
        "models": MODELS,
        "tasks": {"odd": [31.4, None, *range(40, 47)], "imagenet": [*range(60, 69)]},
    },
    "zero_shot_paper": {"source": "of nulls", "models": MODELS, "tasks": {"odd": [None] * 9}},
    "linear_probe": {"source": "a paper", "models": MODELS, "tasks": {"odd": [70] + [None] * 8}},
    "image_to_text_recall@1": {"source": "its retrieval", "models": MODELS[-1:], "tasks": {"pairs": [88]}},
    "shift": {"source": "another", "models": MODELS, "tasks": {name: [*range(50, 59)] for name in SHIFTS}},
    "standard_models": {
        "source": "a third",
        "models": STANDARD,
        "tasks": {
            "imagenet": ON_IMAGENET.tolist(),
            **{name: (ON_IMAGENET + 100 * by).tolist() for name, by in SHIFTS.items()},
        },
    },
}


def zero_shot_task(name="odd", images=60, side=24, **others):
    rng = np.random.default_rng(0)
    classes = len(ODD)
    labels = np.arange(images) % classes
    probabilities = rng.dirichlet(np.full(classes, 0.3), images)
    best = np.argsort(-probabilities, axis=1)[:, :5]
    colors = rng.integers(0, 256, (images, side, side, 3), dtype=np.uint8)
    arrays = {
        "labels": labels.astype(np.int32),
        "best": best.astype(np.int32),
        "probabilities": np.take_along_axis(probabilities, best, 1).astype(np.float32),
    }
    settings = {
        "metrics": {"top_1": 0.1234, "top_5": 0.5432, "calibration_error": 0.0876},
        "counts": {"images": images, "classes": classes},
        "chance": {"top_1": 1 / classes, "top_5": 5 / classes},
        "largest_class": {"top_1": 0.2, "top_5": 0.6},
        "baseline": {"top_1": 0.0911},
        "synthetic_shift": {"gaussian_noise": [0.11, 0.09, 0.07, 0.05, 0.03], "blur": [0.12, 0.1, 0.08, 0.06, 0.0412]},
        "linear_probe": {"accuracy": 0.6543, "mean_per_class": 0.05, "C": 0.316},
        "class_names": ODD,
        "arrays": arrays,
        "image_at": lambda index: colors[index],
    }
    return TaskResult(name, "Odd <names> & more", "zero_shot", "top_1", **(settings | others))


def retrieval_task(**others):
    rng = np.random.default_rng(1)
    metrics = {
        f"{way}_recall@{k}": share for way, share in (("image_to_text", 0.21), ("text_to_image", 0.32)) for k in (1,)
    }
    right = np.zeros((3, 5), bool)
    right[0, 2] = right[2, 0] = True
    settings = {
        "metrics": metrics | {"image_to_text_recall@5": 0.43, "text_to_image_recall@5": 0.54},
        "counts": {"images": 20, "texts": 20},
        "chance": dict.fromkeys(metrics, 0.05),
        "texts": ["a <i>text</i>", "a dog", "two & three"],
        "arrays": {
            "shown_texts": np.arange(3, dtype=np.int32),
            "best_images": rng.integers(0, 20, (3, 5)).astype(np.int32),
            "right_images": right,
        },
        "image_at": lambda index: np.full((200, 200, 3), 10 * index, np.uint8),
    }
    return TaskResult("pairs", "Pairs", "retrieval", "image_to_text_recall@1", **(settings | others))


def plain_task(name, share):
    return TaskResult(name, "", "zero_shot", "top_1", {"top_1": share}, {"images": 50_000, "classes": 1_000})


HISTORY = [
    *({"step": step, "loss": 3 - step / 500, "image_to_text_accuracy": 0.5, "text_to_image_accuracy": 0.4}
      for step in range(1, 1001)),
    *({"step": step, "odd/top_1": step / 5000, "odd/top_5": step / 2000} for step in (500, 1000)),
]  # fmt: skip


class Page(HTMLParser):
    """The page's parts; fails on an unbalanced one."""

    VOID = ("meta", "img", "br")
    OPTIONAL = ("html",)

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.images, self.rows, self.headings, self.words = [], [], [], [], [], []
        self._open, self._cells = [], None
        self.feed(text)
        self.close()
        assert not [tag for tag in self._open if tag not in self.OPTIONAL]

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs)
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in self.VOID:
            self._open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])
        if tag == "img":
            self.images.append(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_endtag(self, tag):
        if tag not in self.OPTIONAL:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data
        if self._open and self._open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data

    def row(self, first):
        """The cells after the first one of the only row that begins with it."""
        (row,) = [row[1:] for row in self.rows if row and row[0] == first]
        return row


def report(folder, *tasks, history=(), published=None, missing=(), model="/home/me/runs/<odd> & $model$", made=None):
    results = Results(model, "ViT-B/32", list(tasks), list(missing))
    write_report(epath.Path(folder), results, history, published or {}, made)
    return (folder / "report.html").read_text(encoding="utf-8")


def decoded(image):
    """Returns the data of an image, and checks that it can be decoded and has the stated size."""
    kind, _, data = image["src"].partition(";base64,")
    assert kind.startswith("data:image/")
    content = base64.b64decode(data, validate=True)
    if kind == "data:image/svg+xml":
        assert ElementTree.fromstring(content).tag.endswith("svg")
    else:
        decoded_image = Image.open(io.BytesIO(content))
        decoded_image.load()
        assert (str(decoded_image.width), str(decoded_image.height)) == (image["width"], image["height"])
        assert max(decoded_image.size) <= 160
    return content


def check(text):
    """What holds for every page."""
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    for image in page.images:
        assert image["alt"].strip()
        decoded(image)
    assert "http" not in text.replace("http-equiv", "")
    return page


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    tasks = [zero_shot_task(), retrieval_task(), plain_task("imagenet", 0.612), plain_task("sketches", 0.567)]
    missing = [MissingTask("food", "Food <101>", "no folder here/food", "get it & unpack it")]
    folder = tmp_path_factory.mktemp("report") / "made" / "here"
    text = report(folder, *tasks, plain_task("art", 0.4), history=HISTORY, published=PUBLISHED, missing=missing)
    return text, check(text)


def test_names_are_text_and_never_markup(everything):
    text, page = everything
    words = " ".join(page.words)
    for name in [*ODD[:4], "Odd <names> & more", "a <i>text</i>", "two & three", "Food <101>", "<odd> & $model$"]:
        assert name in words
    for markup in ["<b>bold", "<names>", "<i>", "<101>", "<odd>"]:
        assert markup not in text


def test_the_page_is_small(everything):
    assert len(everything[0]) < 1_500_000


def test_the_summary_has_the_main_metric_chance_and_baseline(everything):
    _, page = everything
    rows = [row for row in page.rows if row[0] == "Odd <names> & more"]
    value = "12.3 not above largest class"
    assert rows[0] == ["Odd <names> & more", "top-1", value, "8.3", "20.0", "9.1", "60", "12"]
    assert next(row for row in page.rows if row[0] == "Pairs")[1:] == [
        "image to text, recall@1",
        "21.0",
        "5.0",
        "–",
        "–",
        "20",
        "20",
    ]
    head = ["task", "metric", "this model, %", "chance, %", "largest class, %", "nearest mean image, %"]
    assert [*head, "images", "classes or texts"] in page.rows
    assert page.links == ["#task-1", "#task-2", "#task-3", "#task-4", "#task-5"]


def test_all_metrics_and_published_numbers_are_on_the_page(everything):
    _, page = everything
    assert page.row("top-5") == ["54.3 not above largest class", "41.7", "60.0", "–"]
    assert page.row("calibration error") == ["8.8", "–", "–", "–"]
    assert ["zero-shot, measured", "12.3", "31.4", "–", *(f"{n}.0" for n in range(40, 47))] in page.rows
    assert page.row("linear probe, in the paper") == ["65.4", "70.0", *"–" * 8]
    assert ["%", "this model", *MODELS] in page.rows
    assert page.row("gaussian noise") == ["11.0", "9.0", "7.0", "5.0", "3.0"]
    assert page.row("blur")[-1] == "4.1"
    assert page.row("accuracy") == ["65.4", "8.3", "20.0", "9.1"]  # of the linear probe, all in per cent
    assert page.row("mean per class") == ["5.0", "–", "–", "–"]
    assert "C = 0.316" in " ".join(page.words)
    assert "calibration error 8.8 %" in " ".join(page.words)


def test_retrieval_has_both_directions_chance_and_marks(everything):
    _, page = everything
    assert page.row("image to text") == ["21.0", "43.0"]
    assert page.row("image to text, recall@1") == ["21.0", "88.0"]
    assert page.row("text to image, chance") == ["5.0", "–"]
    assert sum(word.startswith("✓ ") and word[2:].isdigit() for word in page.words) == 2
    assert len([image for image in page.images if "rank" in image["alt"]]) == 15


def test_effective_robustness_is_the_accuracy_above_the_standard_models(everything):
    _, page = everything
    accuracy, gain = page.row("average of 2")
    assert accuracy == percent((0.567 + 0.4) / 2) and gain.startswith("+")
    shift = [row for row in page.rows if row[0] == "sketches" and len(row) == 3]
    # The standard models lose 30 points of 61; this one keeps 56.7 %, nearly all of it.
    assert float(shift[0][2]) == pytest.approx(56.7 - 31.2, abs=2)
    assert {"sketches: 56.7 % against 61.2 % on ImageNet", "art: 40.0 % against 61.2 % on ImageNet"} <= {
        image["alt"] for image in page.images
    }


def test_the_mistakes_are_those_of_highest_probability(everything):
    task = zero_shot_task()
    labels, best, probabilities = (task.arrays[name] for name in ("labels", "best", "probabilities"))
    wrong = np.flatnonzero(best[:, 0] != labels)
    order = wrong[np.argsort(-probabilities[wrong, 0], kind="stable")][:12]
    images = [image for image in everything[1].images if image["src"].startswith("data:image/png")]
    shown = [np.asarray(Image.open(io.BytesIO(decoded(image)))) for image in images[:24]]
    np.testing.assert_array_equal(shown[::2], [task.image_at(index) for index in order])
    # Beside each, an image of the class that was answered.
    answers = best[order, 0]
    np.testing.assert_array_equal(shown[1::2], [task.image_at(int(np.argmax(labels == answer))) for answer in answers])
    assert [image["alt"] for image in images[1:24:2]] == [f"the answer: {ODD[answer]}" for answer in answers]
    drawn = np.sort(np.random.default_rng(0).choice(60, 36, replace=False))
    assert len(images) == 24 + 36 + (best[drawn, 0] != labels[drawn]).sum()


def test_the_page_states_that_the_data_has_no_image_of_an_answer(tmp_path):
    arrays = {"labels": np.zeros(3, int), "best": np.full((3, 1), 2), "probabilities": np.full((3, 1), 0.5)}
    page = check(report(tmp_path, zero_shot_task(arrays=arrays, class_names=["ant", "bee", "cat"])))
    assert " ".join(page.words).count("The data has no image of “cat”.") == 3 + 3
    assert len([image for image in page.images if "png" in image["src"][:20]]) == 3 + 3


def test_the_confusions_count_the_wrong_answers_of_the_worst_classes(tmp_path):
    labels = np.repeat([0, 1, 2, 3, 4], [8, 5, 6, 5, 4])
    first = np.array([1] * 4 + [2] * 2 + [0] * 2 + [1] * 5 + [0, 0, 1] * 2 + [3] * 4 + [0] + [1] * 4)
    arrays = {"labels": labels, "best": first[:, None], "probabilities": np.full((28, 1), 0.5)}
    page = check(report(tmp_path, zero_shot_task(arrays=arrays, class_names=["ant", "bee", "cat"])))
    at = page.rows.index(["class", "wrong answers (times)", "images", "recognized, %"])
    assert page.rows[at + 1 :][:4] == [
        ["cat", "ant (4), bee (2)", "6", "0.0"],
        ["ant", "bee (4), cat (2)", "8", "25.0"],
        ["class 3", "ant (1)", "5", "80.0"],
        ["bee", "–", "5", "100.0"],
    ]
    words = " ".join(page.words)
    assert "1 of 4 classes are never recognized. 1 classes with fewer than 5 images are not listed." in words


def test_the_recall_of_a_class_with_one_image_is_not_shown(tmp_path):
    arrays = {"labels": np.arange(12), "best": np.zeros((12, 1), int), "probabilities": np.full((12, 1), 0.5)}
    page = check(report(tmp_path, zero_shot_task(arrays=arrays)))
    assert not any("recall" in heading for heading in page.headings)


@pytest.mark.parametrize(
    ("model", "title"),
    [
        ("/home/me/runs/quickstart", "quickstart"),
        ("runs/quickstart/", "quickstart"),
        ("gs://bucket/runs/b32", "b32"),
        ("weights/ViT-B-32.pt", "ViT-B-32.pt"),
        ("/data/my clip/model.safetensors", "my clip/model.safetensors"),
        ("model.safetensors", "model.safetensors"),
    ],
)
def test_the_title_is_the_models_name_without_its_path(model, title):
    assert title_of(model) == title


def test_a_run_in_this_folder_has_the_folders_name_as_its_title(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert title_of(".") == tmp_path.name


def test_the_page_has_date_command_steps_times_devices_versions_commit_and_config(tmp_path):
    facts = {"steps": "5,000", "training_time": "6m02s", "evaluation_time": "42s", "config": '{"a": "<b>"}'}
    made = provenance("clip_jax.main", ["--config=a b.py", "--workdir=x"], model="/a/<b>", **facts)
    text = report(tmp_path, history=HISTORY, made=made)
    page, words = check(text), " ".join(Page(text).words)
    for expected in ("python -m clip_jax.main '--config=a b.py' --workdir=x", "/a/<b>", '{"a": "<b>"}'):
        assert expected in words
    names = ["Date", "Command", "Model", "Steps", "Training time", "Evaluation time", "Devices", "Versions"]
    assert [name for name in names if f"<dt>{name}</dt>" in text] == names and "How this was made" in page.headings
    assert "UTC" in made.date and made.devices.startswith("8 x cpu") and "jax 0." in made.versions
    assert "Python 3." in made.versions and "clip_jax 0" in made.versions
    bare = Provenance("now", "command", "device", "versions", "")
    assert "<dt>Commit</dt>" not in report(tmp_path, made=bare) and "Config" not in report(tmp_path, made=bare)


def test_the_commit_is_that_of_the_checkout_of_this_package_alone(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert commit_of(tmp_path) == ""  # no checkout
    git("init", "-q")
    (tmp_path / "clip_jax").mkdir()
    (tmp_path / "clip_jax/__init__.py").write_text("")
    (tmp_path / "other.txt").write_text("")
    git("add", "other.txt")
    git("commit", "-qm", "one")
    assert commit_of(tmp_path) == ""  # a checkout of something else, around an installed package
    git("add", "clip_jax")
    git("commit", "-qm", "two")
    assert commit_of(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "clip_jax/__init__.py").write_text("x = 1")
    assert commit_of(tmp_path) == git("rev-parse", "HEAD") + ", with changes that are not committed"


def test_curves_of_training_alone_are_a_page_too(tmp_path):
    page = check(report(tmp_path, history=HISTORY))
    assert page.headings == ["<odd> & $model$", "Training"]
    assert [image["alt"].split(" over ")[0] for image in page.images][::2] == ["Training loss", "odd: top-1 and top-5"]


def test_the_page_without_results(tmp_path):
    page = check(report(tmp_path))
    assert not page.images and "Nothing was evaluated." in " ".join(page.words)


def test_every_part_is_optional(tmp_path):
    bare = {"chance": {}, "largest_class": {}, "baseline": {}, "synthetic_shift": {}, "linear_probe": {}}
    task = zero_shot_task()
    several = {name: task.arrays[name] for name in ("best", "probabilities")}  # without labels
    tasks = [
        zero_shot_task("a", **bare, image_at=None),
        zero_shot_task("b", **bare, arrays={}),
        zero_shot_task("c", **bare, arrays=several),
        zero_shot_task("d", **bare, arrays={"labels": task.arrays["labels"], "best": task.arrays["best"]}),
        retrieval_task(image_at=None, chance={}),
        plain_task("imagenet", 0.6),
    ]
    page = check(report(tmp_path, *tasks, history=[{"step": 1, "loss": float("nan")}], published={"zero_shot": {}}))
    assert "Natural distribution shift" not in page.headings


def test_shifts_without_standard_models_have_no_line(tmp_path):
    published = {"shift": PUBLISHED["shift"], "zero_shot": PUBLISHED["zero_shot"]}
    page = check(report(tmp_path, plain_task("imagenet", 0.6), plain_task("art", 0.5), published=published))
    assert [row for row in page.rows if row[0] == "art" and len(row) == 3] == [["art", "50.0", "–"]]


def test_a_page_of_many_tasks_shows_fewer_images_of_each(tmp_path):
    tasks = [zero_shot_task(f"task {number}", side=8, synthetic_shift={}) for number in range(15)]
    text = report(tmp_path, *tasks)
    check(text)
    assert text.count("<figcaption><b>") == text.count('<figcaption class="pair"><b>') == 15 * 12


def test_the_same_results_give_the_same_page(tmp_path):
    pages = [report(tmp_path / name, zero_shot_task(), history=HISTORY) for name in "ab"]
    assert pages[0] == pages[1]


def test_published_numbers_are_well_formed():
    for entry in load_published().values():
        if isinstance(entry, dict) and "tasks" in entry:
            assert all(len(row) == len(entry["models"]) for row in entry["tasks"].values())


@pytest.mark.parametrize(
    ("share", "shown"), [(0.1234, "12.3"), (0.0005, "0.05"), (0, "0.0"), (1, "100.0"), (None, "–"), (np.nan, "–")]
)
def test_shares_are_shown_as_per_cent(share, shown):
    assert percent(share) == shown
