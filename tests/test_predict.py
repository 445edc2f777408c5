"""Tests that a trained run can be used, from the command line and from Python."""

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from trial import SMALL, environment

import clip_jax
from clip_jax.convert import main as convert
from clip_jax.main import main as train
from clip_jax.predict import main as predict

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run of two steps with every evaluation, in a folder that also has an image."""
    folder = tmp_path_factory.mktemp("trained")
    Image.new("RGB", (20, 30), "red").save(folder / "photo.png")
    task = {
        "name": "held_out",
        "kind": "zero_shot",
        "source": "emoji:openmoji/held_out",
        "prompts": "emoji",
        "pixel_baseline": "emoji:noto/held_out",
    }
    (folder / "task.json").write_text(json.dumps(task))
    evaluations = [f"--config.evaluation.tasks={folder}/task.json,emoji_unseen_concepts"]
    steps = ["--config.steps=4", "--config.eval_every=2", "--config.checkpoint_every=2"]
    assert train([*SMALL, *steps, *evaluations, f"--workdir={folder}/run"]) == 0
    return folder


@pytest.fixture(scope="module")
def model(run):
    return clip_jax.load(run / "run", batch_size=2)


def test_a_finished_run_has_all_its_files(run):
    workdir = run / "run"
    for name in (
        "config.json",
        "checkpoints/4",
        "metrics.jsonl",
        "eval/2.json",
        "eval/4.json",
        "report/report.html",
        "report/results.json",
        "report/arrays/held_out.npz",
    ):
        assert (workdir / name).exists(), name
    assert list((workdir / "tensorboard").iterdir())
    results = json.loads((workdir / "eval/4.json").read_text())
    task = results["tasks"]["held_out"]
    assert task["counts"] == {"images": 205, "classes": 205}
    assert task["baseline"]["top_1"] > 0.05
    assert results["tasks"]["emoji_unseen_concepts"]["counts"] == {"images": 410, "texts": 205}
    scalars = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in scalars if "held_out/top_1" in record] == [2, 4]


def test_the_report_is_one_self_contained_page(run):
    page = (run / "run/report/report.html").read_text()
    assert page.count("data:image/") > 10
    assert 'src="http' not in page
    assert "nearest mean image" in page


def test_predict_prints_one_line_for_each_image(run, capsys):
    image = str(run / "photo.png")
    assert predict([f"--model={run}/run", "--labels=red apple, dog face,house", "--top=2", image, image]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(image)
    assert lines[0].count("%") == 2


def test_predict_as_json_gives_probabilities_of_every_label(run, capsys):
    image = str(run / "photo.png")
    assert predict([f"--model={run}/run", "--labels=red apple,dog face", "--json", image]) == 0
    probabilities = json.loads(capsys.readouterr().out)[image]
    assert probabilities.keys() == {"red apple", "dog face"}
    assert sum(probabilities.values()) == pytest.approx(1)


@pytest.fixture
def folder(tmp_path, model, monkeypatch):
    """A folder with images and other files; predict uses the loaded model."""
    monkeypatch.setattr("clip_jax.loading.load", lambda *_, **__: model)
    (tmp_path / "sub").mkdir()
    for number, name in enumerate(["a.png", "b.jpg", "sub/c.webp", "sub/[d].png"]):
        Image.new("RGB", (20, 30), (60 * number, 50, 50)).save(tmp_path / name)
    Image.new("RGB", (4, 4)).save(tmp_path / "no_ending", format="PNG")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link").symlink_to(".")
    return tmp_path


def lines_of(capsys):
    output, errors = capsys.readouterr()
    return output.splitlines(), errors.splitlines()


def test_a_bad_image_is_one_line_and_the_others_are_labeled(folder, capsys):
    names = ["a.png", "broken.png", "b.jpg", "pipe.png"]
    assert predict(["--model=m", "--labels=x,y", *(str(folder / name) for name in [*names, "none.png"])]) == 1
    output, errors = lines_of(capsys)
    assert [line.split()[0] for line in output] == [str(folder / "a.png"), str(folder / "b.jpg")]
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    for name in ("broken.png", "pipe.png", "none.png"):
        assert sum(name in line for line in errors) == 1


def test_a_folder_stands_for_its_images_in_order_and_other_files_are_counted(folder, capsys):
    found = ["a.png", "b.jpg", "no_ending", "sub/[d].png", "sub/c.webp"]
    assert predict(["--model=m", "--labels=x,y", "--json", str(folder), str(folder), str(folder / "a.png")]) == 1
    output, errors = capsys.readouterr()
    answers = json.loads(output)
    assert list(answers) == [str(folder / name) for name in found]
    for row in answers.values():
        assert sum(row.values()) == pytest.approx(1)
    note, error = errors.splitlines()
    assert "passed over 4 files" in note and ".hidden.png" in note
    assert "broken.png" in error


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.png", ["a.png"]),
        ("**/*.png", ["a.png", "sub/[d].png"]),
        ("**", ["a.png", "b.jpg", "no_ending", "sub/[d].png", "sub/c.webp"]),
        ("*/?.webp", ["sub/c.webp"]),
        ("sub/[d].png", ["sub/[d].png"]),  # the name of a file, although it is also a pattern
    ],
)
def test_a_pattern_stands_for_the_files_that_it_matches(folder, capsys, pattern, found):
    predict(["--model=m", "--labels=x,y", f"{folder}/{pattern}"])
    output, _ = lines_of(capsys)
    assert [line.rpartition("  ")[0].split("  ")[0].strip() for line in output] == [
        f"{folder}/{name}" for name in found
    ]


def test_limits_of_pixels_and_aspect_can_be_set(folder, capsys):
    Image.new("L", (300, 2)).save(folder / "long.png")
    path = str(folder / "long.png")
    assert predict(["--model=m", "--labels=x,y", path]) == 2
    assert "--max-aspect-ratio allows more" in capsys.readouterr().err
    assert predict(["--model=m", "--labels=x,y", "--max-aspect-ratio=150", path]) == 0
    assert predict(["--model=m", "--labels=x,y", "--max-aspect-ratio=150", "--max-pixels=599", path]) == 2
    assert "300 x 2 pixels are more than 599; --max-pixels allows more" in capsys.readouterr().err


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_labels_come_from_a_file(folder, capsys, monkeypatch, ends):
    lines = ["\ufeffred, green", "", " # five ", "blue\u2028", "blue", "red, green"]
    (folder / "labels.txt").write_bytes(ends.join(lines).encode())
    monkeypatch.setenv("HOME", str(folder))
    assert predict(["--model=m", "--labels=@~/labels.txt", "--json", "~/a.png"]) == 0
    output, errors = capsys.readouterr()
    assert list(json.loads(output)[str(folder / "a.png")]) == ["red, green", "# five", "blue"]
    assert errors == "note: --labels repeats 'red, green', 'blue'; each counts once\n"


def test_a_label_that_is_cut_is_noted(folder, capsys):
    assert predict(["--model=m", f"--labels=short,{'long ' * 40}", str(folder / "a.png")]) == 0
    [note] = capsys.readouterr().err.splitlines()
    assert note.startswith("note: labels longer than the model's") and "'long long" in note and "short" not in note


def test_a_name_that_is_not_text_is_escaped(folder, capsys):
    name = os.fsdecode(b"a\xff\nb.png")
    Image.new("RGB", (4, 4)).save(folder / name)
    assert predict(["--model=m", "--labels=x", str(folder / name)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{folder}/a\\udcff\\nb.png  x 100.0%"]
    assert predict(["--model=m", "--labels=x", "--json", str(folder / name)]) == 0
    assert json.loads(capsys.readouterr().out) == {str(folder / name): {"x": 1}}


def test_a_closed_pipe_ends_predict_quietly(run):
    command = f"{sys.executable} -m clip_jax.predict --model={run}/run --labels=a,b {' '.join(['photo.png'] * 300)}"
    ended = subprocess.run(
        ["bash", "-c", f"{command} | head -1; exit ${{PIPESTATUS[0]}}"],
        cwd=run,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (141, "")
    assert ended.stdout.startswith("photo.png ")


def test_a_run_is_loaded_without_a_warning(run, tmp_path, caplog, monkeypatch):
    logger = logging.getLogger("clip_jax")
    monkeypatch.setattr(logger, "propagate", True)  # commands turn it off
    clip_jax.load(run / "run")
    assert convert([str(run / "run"), str(tmp_path / "ours")]) == 0
    logger.propagate = True
    clip_jax.load(tmp_path / "ours")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("flag", ["--top=x", "--max-pixels=1e9", "--unknown", "--lab=a"])
def test_flags_that_cannot_be_read_are_one_line(capsys, flag):
    assert predict(["--model=m", "--labels=a", flag, "a.png"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and flag.partition("=")[0] in line


def test_mistakes_of_predict_are_one_line(run, capsys):
    broken = run / "broken.png"
    broken.write_bytes(b"nothing")
    for arguments, expected in [
        ([f"--model={run}", "--labels=a,b", str(run / "photo.png")], "holds no model"),
        ([f"--model={run}/run", "--labels=a,b", str(run / "none.png")], "none.png"),
        ([f"--model={run}/run", "--labels=a,b", str(broken)], "broken.png"),
        ([f"--model={run}/run", "--labels=,", str(run / "photo.png")], "--labels"),
        ([f"--model={run}/run", "--labels=a", "--top=0", str(run / "photo.png")], "--top"),
        ([f"--model={run}/run", "--labels=a", "--template=no", str(run / "photo.png")], "--template"),
        ([f"--model={run}/run", "--labels=a", "--max-pixels=0", str(run / "photo.png")], "--max-pixels=0"),
        ([f"--model={run}/run", "--labels=a", "--max-aspect-ratio=nan", str(run / "photo.png")], "--max-aspect-ratio"),
        ([f"--model={run}/run", f"--labels=@{run}/none.txt", str(run / "photo.png")], "none.txt"),
        ([f"--model={run}/run", f"--labels=@{run}", str(run / "photo.png")], "Is a directory"),
        ([f"--model={run}/run", f"--labels=@{run}/photo.png", str(run / "photo.png")], "not UTF-8"),
        ([f"--model={run}/run", "--labels=a", str(run / "run/tensorboard")], "no images"),
        ([f"--model={run}/run", "--labels=a", str(run / "*.jpg")], "*.jpg: no files match"),
    ]:
        assert predict(arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert expected in line


def test_a_transparent_image_is_the_same_by_path_and_as_a_pillow_image(run):
    path = run / "transparent.png"
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(path)
    by_path, as_image, white = clip_jax.load(run / "run").encode_image(
        [path, Image.open(path), Image.new("RGB", (20, 20), "white")]
    )
    np.testing.assert_array_equal(by_path, as_image)
    np.testing.assert_array_equal(by_path, white)


def test_one_label_and_one_template_are_not_split_into_letters(run, model):
    np.testing.assert_array_equal(model.classify(run / "photo.png", "cat", "a {}"), [[1]])
    images = (path for path in [run / "photo.png"] * 2)
    labels = (label for label in ["cat", "dog", "house"])
    assert model.classify(images, labels).shape == (2, 3)


@pytest.mark.parametrize(
    "image",
    [np.zeros((0, 0, 3), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), Image.new("RGB", (0, 5))],
    ids=["empty array", "floats", "two channels", "empty image"],
)
def test_an_invalid_image_is_refused(model, image):
    with pytest.raises(ValueError, match="image"):
        model.encode_image([image])


def test_a_loaded_model_takes_texts_or_tokens(model):
    length = model.preset.text.context_length
    tokens = clip_jax.tokenize(["a cat", "a dog", "a house"], length)
    by_text = model.encode_text(["a cat", "a dog", "a house"])
    np.testing.assert_allclose(model.encode_text(tokens), by_text, rtol=0, atol=1e-6)
    np.testing.assert_allclose(model.encode_text(tokens[0]), by_text[:1], rtol=0, atol=1e-6)
    assert model.encode_text([]).shape == (0, model.preset.embed_dim)
    for wrong in (tokens + 1e5, tokens + 100_000, np.zeros((1, length + 1), np.int32)):
        with pytest.raises(ValueError, match="tokens must"):
            model.encode_text(wrong)


@pytest.mark.parametrize("options", [{"dtype": "float8"}, {"batch_size": 0}])
def test_invalid_options_of_load_are_refused(run, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        clip_jax.load(run / "run", **options)


def test_a_loaded_model_embeds_paths_pillow_images_and_arrays_alike(run):
    model = clip_jax.load(run / "run")
    image = Image.open(run / "photo.png")
    embeddings = model.encode_image([run / "photo.png", image, np.asarray(image)])
    assert embeddings.shape == (3, model.preset.embed_dim)
    np.testing.assert_array_equal(embeddings[0], embeddings[1])
    np.testing.assert_array_equal(embeddings[0], embeddings[2])
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    assert model.logit_scale == pytest.approx(1 / 0.07, rel=0.05)
    probabilities = model.classify([image], ["red", "blue", "green"])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
