"""Tests the command: its output, missing data, and that a mistake is one line."""

import json

import numpy as np
import pytest
from PIL import Image
from trial import SMALL

from clip_jax.evaluate import main
from clip_jax.main import main as train

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train([*SMALL, "--config.steps=2", f"--workdir={folder}"]) == 0
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def task_file(tmp_path):
    """A function that writes a task over three images, with some of its values changed."""
    for name in ("cat", "dog", "bird"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20), tuple(map(len, (name, name * 9, name * 50)))).save(
            tmp_path / "images" / name / "1.png"
        )

    def write(**changes):
        task = {"name": "animals", "kind": "zero_shot", "source": "image_folder:{data}/images"} | changes
        (tmp_path / "task.json").write_text(
            json.dumps({key: value for key, value in task.items() if value is not None})
        )
        return str(tmp_path / "task.json")

    return write


def mistake(capsys, *arguments):
    """The lines of a command that ends with a mistake."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    return lines


def test_a_task_from_a_file_is_scored_printed_and_reported(run, task_file, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = [
        f"--model={run}",
        f"--tasks={task_file()},emoji_unseen_both",
        f"--data={tmp_path}",
        f"--output={output}",
    ]
    assert main([*arguments, "--synthetic-shift"]) == 0
    captured = capsys.readouterr()
    printed = captured.out
    assert "animals, 3 images, 3 classes:" in printed and "top_1 under blur" in printed and not captured.err
    results = json.loads((output / "results.json").read_text())
    assert results["tasks"]["animals"]["counts"] == {"images": 3, "classes": 3}
    assert len(results["tasks"]["animals"]["synthetic_shift"]["jpeg"]) == 5
    with np.load(output / "arrays/animals.npz") as arrays:
        assert arrays["class_names"].tolist() == ["bird", "cat", "dog"]
    page = (output / "report.html").read_text()
    assert "animals" in page and "<title>clip_jax: run</title>" in page
    command = f"python -m clip_jax.evaluate --model={run} --tasks={tmp_path}/task.json,emoji_unseen_both"
    for expected in (command, "<dt>Steps</dt><dd>2</dd>", "<dt>Training time</dt>", "<dt>Evaluation time</dt>"):
        assert expected in page
    trained = (run / "report/report.html").read_text()
    for expected in (
        f"python -m clip_jax.main {' '.join(SMALL)}",
        "<dt>Steps</dt><dd>2</dd>",
        "<dt>Training time</dt>",
    ):
        assert expected in trained
    # The same again, with the class names' embeddings from the cache.
    assert main([*arguments, "--synthetic-shift"]) == 0
    assert json.loads((output / "results.json").read_text()) == results
    assert len(list((tmp_path / "cache/clip_jax/classifiers").iterdir())) == 1


def test_two_outputs_are_compared(run, tmp_path, capsys):
    for name in ("one", "other"):
        assert main([f"--model={run}", "--tasks=emoji_unseen_both", f"--output={tmp_path / name}"]) == 0
    capsys.readouterr()
    assert main(["--compare", str(tmp_path / "one"), str(tmp_path / "other"), f"--output={tmp_path / 'both'}"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"  {run}")]
    assert len(rows) == 2 and " +0.0 [+0.0, +0.0]" in rows[1], rows
    assert (tmp_path / "both/comparison.html").exists()


def test_a_missing_task_is_printed_and_is_in_the_report(run, task_file, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = [f"--model={run}", f"--tasks={task_file()},birdsnap", f"--data={tmp_path}", f"--output={output}"]
    assert main(arguments) == 0
    assert capsys.readouterr().err.startswith(f"missing: birdsnap: no folder {tmp_path}/birdsnap/test; get it: ")
    results = json.loads((output / "results.json").read_text())
    assert results["missing"]["birdsnap"]["reason"] == f"no folder {tmp_path}/birdsnap/test"
    assert "Birdsnap" in (output / "report.html").read_text()


def test_the_list_shows_the_data_and_how_to_get_missing_data(capsys, tmp_path):
    assert main(["--list", f"--data={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "emoji_unseen_style        zero_shot  top_1" in printed and "found, 1,906 images" in printed
    assert f"missing: no folder {tmp_path}/birdsnap/test" in printed
    assert "get it: tfds build food101 --file_format=array_record" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "accuracy"}, "task animals: metric='accuracy' must be one of top_1, top_5, mean_per_class"),
        ({"metric": "roc_auc"}, "error: animals: metric='roc_auc' cannot be computed for 3 classes"),
        ({"metric": "top_5"}, "error: animals: metric='top_5' cannot be computed for 3 classes"),
        ({"kind": "probe"}, "task animals: kind='probe' must be one of zero_shot, retrieval"),
        (
            {"class_names": ["cat", "wolf"]},
            "error: animals: 2 of its 3 classes match none of the task's 2 class names: 'bird'",
        ),
        ({"class_names": ["cat", "dog", ""]}, "error: animals: class_names has an empty entry at index 2"),
        ({"validation": "digits:test"}, "task animals: validation has no effect with kind='zero_shot'"),
        ({"class_names": ["a"], "labels": ["a", "b"]}, "task animals: 1 class_names for 2 labels"),
        ({"templates": ["a photo"]}, "error: animals: the template 'a photo' must have one {}"),
        ({"prompts": "imagenette"}, "error: animals: there are no prompts 'imagenette'"),
        ({"metrics": "top_1"}, "a task has no key 'metrics'; did you mean 'metric'?"),
        ({"class_names": "a,b"}, 'class_names must be a list of strings, not "a,b"'),
        ({"other_classes": 1}, "other_classes must be true or false, not 1"),
        ({"source": None}, "a task needs source"),
        ({"source": "image_folder:{data}/empty"}, "empty has no folders; it must have one for each class"),
        ({"source": "image_folder:{data}/nothing"}, "no task has its data; --list shows how to get it"),
        ({"source": "images"}, "'images' is not a source"),
        ({"name": "../animals"}, "a task's name may have letters, digits, _, - and . only, not '../animals'"),
    ],
)
def test_a_mistake_in_a_task_is_one_line(run, task_file, tmp_path, capsys, changes, message):
    (tmp_path / "empty").mkdir()
    lines = mistake(capsys, f"--model={run}", f"--tasks={task_file(**changes)}", f"--data={tmp_path}")
    assert message in lines[-1]
    assert len(lines) == 1 or lines[0].startswith("missing: animals")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=digits"], "give one of --model, --list and --compare"),
        (["--model=x", "--list"], "give one of --model, --list and --compare"),
        (["--model=x"], "--tasks names no task"),
        (["--model=x", "--tasks=imagnet"], "there is no task or group 'imagnet'; did you mean 'imagenet'?"),
        (["--model=x", "--tasks=no.json"], "No such file"),
        (["--model=/nowhere", "--tasks=digits"], "/nowhere: there is no such file or folder"),
        (["--compare", "/nowhere", "/elsewhere"], "/nowhere"),
        (["--compare", "/nowhere"], "at least two"),
        (["--compare"], "expected at least one argument"),
        (["--modl=x"], "unknown argument --modl=x; did you mean --model?"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, arguments, message):
    (line,) = mistake(capsys, *arguments)
    assert message in line


def test_weights_that_are_not_finite_are_one_line(run, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    from clip_jax.convert import main as convert

    assert convert([str(run), str(tmp_path / "weights"), "--to=huggingface"]) == 0
    (file,) = (tmp_path / "weights").glob("*.safetensors")
    tensors = load_file(file)
    tensors["visual_projection.weight"] = np.full_like(tensors["visual_projection.weight"], np.nan)
    save_file(tensors, file)
    capsys.readouterr()
    (line,) = mistake(capsys, f"--model={tmp_path / 'weights'}", "--tasks=emoji_unseen_both")
    assert "emoji_unseen_both: 205 of 205 embeddings are not finite" in line


def test_results_are_written_when_another_task_fails(run, task_file, tmp_path, capsys):
    (tmp_path / "torn/a").mkdir(parents=True)
    (tmp_path / "torn/a/1.png").write_bytes(b"no image")
    (tmp_path / "torn.json").write_text(
        json.dumps({"name": "torn", "kind": "zero_shot", "source": f"image_folder:{tmp_path}/torn"})
    )
    output = tmp_path / "out"
    tasks = f"{tmp_path}/torn.json,{task_file()},{tmp_path}/broken.json"
    (tmp_path / "broken.json").write_text(json.dumps({"name": "broken", "kind": "retrieval", "source": "nothing"}))
    assert main([f"--model={run}", f"--tasks={tasks}", f"--data={tmp_path}", f"--output={output}"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and errors[0].startswith("error: broken: ") and "1.png: not an image" in errors[1]
    results = json.loads((output / "results.json").read_text())
    assert results["tasks"].keys() == {"animals"} and results["missing"].keys() == {"torn", "broken"}
    assert "1.png: not an image" in (output / "report.html").read_text()


def test_an_output_that_is_not_writable_is_reported_before_scoring(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (line,) = mistake(capsys, f"--model={run}", "--tasks=emoji_unseen_both", f"--output={tmp_path / 'file'}")
    assert str(tmp_path / "file") in line


def test_a_damaged_cache_file_is_replaced(run, task_file, tmp_path):
    arguments = [f"--model={run}", f"--tasks={task_file()}", f"--data={tmp_path}", f"--output={tmp_path / 'out'}"]
    assert main(arguments) == 0
    (file,) = (tmp_path / "cache/clip_jax/classifiers").iterdir()
    content, results = file.read_bytes(), (tmp_path / "out/results.json").read_text()
    for damage in (b"", content[:50], b"junk" * 40):
        file.write_bytes(damage)
        assert main(arguments) == 0
        assert file.read_bytes() == content and (tmp_path / "out/results.json").read_text() == results
