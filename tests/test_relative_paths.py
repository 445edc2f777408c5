"""Every command takes the folder of a run, and one that convert wrote, by any path that a shell would take."""

import os

import pytest
from PIL import Image
from trial import SMALL

import clip_jax
from clip_jax.convert import main as convert
from clip_jax.evaluate import main as evaluate
from clip_jax.main import main as train
from clip_jax.main import parse_arguments
from clip_jax.predict import main as predict
from clip_jax.training.preparation import check_workdir, read_initial_variables
from clip_jax.weights import read_weights

pytestmark = pytest.mark.usefixtures("one_device")

PATHS = ["{name}", "./{name}", "{name}/", "../home/{name}", "link/{name}", "link/../home/{name}", "~/{name}"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run, a folder that convert wrote, an image, and a link to the folder in another one."""
    parent = tmp_path_factory.mktemp("relative")
    folder = parent / "home"
    folder.mkdir()
    (folder / "link").symlink_to(folder, target_is_directory=True)
    Image.new("RGB", (20, 30), "red").save(folder / "photo.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train([*SMALL, "--config.steps=2", "--workdir=run"]) == 0
        assert convert(["run", "converted"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _inside(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))


@pytest.mark.parametrize("name", ["run", "converted"])
@pytest.mark.parametrize("path", PATHS)
def test_weights_are_read_from_it(path, name):
    assert read_weights(path.format(name=name)).variables["params"]


@pytest.mark.parametrize("path", ["run", "converted", "~/run/"])
def test_predict_takes_it(path, capsys):
    assert predict([f"--model={path}", "--labels=red,blue", "photo.png"]) == 0
    assert capsys.readouterr().out.startswith("photo.png")


@pytest.mark.parametrize("path", ["run", "../home/converted"])
def test_load_takes_it(path):
    assert clip_jax.load(path).encode_text("red").shape == (1, 16)


@pytest.mark.parametrize(("path", "output"), [("converted", "scores"), ("~/run", "~/scores_at_home")])
def test_evaluate_takes_it_and_writes_where_it_was_told(home, path, output):
    (home / "task.json").write_text(
        '{"name": "few", "kind": "zero_shot", "source": "emoji:noto/held_out", "prompts": "emoji"}'
    )
    assert evaluate([f"--model={path}", "--tasks=task.json", f"--output={output}"]) == 0
    written = home / output.removeprefix("~/")
    assert (written / "report.html").exists()
    assert evaluate(["--compare", output, str(written)]) == 0


@pytest.mark.parametrize(
    ("source", "destination"), [("run", "a"), ("converted", "./new/b.safetensors"), ("~/run", "~/c")]
)
def test_convert_takes_it_and_writes_where_it_was_told(home, source, destination):
    assert convert([source, destination, "--to=open_clip"]) == 0
    assert (home / destination.removeprefix("~/")).exists()


@pytest.mark.parametrize("path", ["run", "converted", "~/run", "link/run/"])
def test_a_training_starts_from_it(path):
    config, _, _ = parse_arguments([*SMALL, f"--config.init_from={path}"])
    assert read_initial_variables(config)["params"]


@pytest.mark.parametrize("path", PATHS)
def test_the_same_folder_is_the_workdir_however_it_is_written(home, path):
    _, workdir, _ = parse_arguments([*SMALL, f"--workdir={path.format(name='run')}"])
    assert os.fspath(check_workdir(workdir)) == str((home / "run").resolve())


def test_a_run_is_resumed_by_another_spelling_of_its_folder(home, capsys):
    assert train([*SMALL, "--config.steps=2", "--workdir=~/run/../run/"]) == 0
    assert "resumed at step 2 of 2" in capsys.readouterr().out
    assert not (home / "~").exists()
