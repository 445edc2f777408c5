"""A trained run can be used: from the command line and from Python."""

import json

import numpy as np
import pytest
from PIL import Image
from trial import SMALL

import clip_jax
from clip_jax.main import main as train
from clip_jax.predict import main as predict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run of two steps with every evaluation, in a folder that also holds a picture."""
    folder = tmp_path_factory.mktemp("trained")
    Image.new("RGB", (20, 30), "red").save(folder / "photo.png")
    evaluations = [
        "--config.evaluation.zero_shot=emoji:openmoji/held_out",
        "--config.evaluation.pixel_baseline=emoji:noto/held_out",
        "--config.evaluation.retrieval.unseen_concepts=emoji:noto,twemoji/held_out",
    ]
    steps = ["--config.steps=4", "--config.eval_every=2", "--config.checkpoint_every=2"]
    assert train([*SMALL, *steps, *evaluations, f"--workdir={folder}/run"]) == 0
    return folder


def test_a_finished_run_leaves_all_that_it_promises(run):
    workdir = run / "run"
    for name in (
        "config.json",
        "checkpoints/4",
        "metrics.jsonl",
        "eval/2.json",
        "eval/4.json",
        "report/index.html",
        "report/loss.png",
        "report/accuracy.png",
        "report/predictions.png",
    ):
        assert (workdir / name).exists(), name
    assert list((workdir / "tensorboard").iterdir())
    results = json.loads((workdir / "eval/4.json").read_text())
    assert results["zero_shot"]["classes"] == 205
    assert results["pixel_baseline"]["top_1"] > 0.05
    assert results["retrieval"]["unseen_concepts"]["images"] == 410
    assert results["retrieval"]["unseen_concepts"]["texts"] == 205


def test_the_report_is_one_self_contained_page(run):
    page = (run / "run/report/index.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert 'src="http' not in page
    assert "nearest mean picture" in page


def test_predict_prints_a_line_a_picture(run, capsys):
    picture = str(run / "photo.png")
    assert predict([f"--model={run}/run", "--labels=red apple, dog face,house", "--top=2", picture, picture]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(picture)
    assert lines[0].count("%") == 2


def test_predict_as_json_gives_probabilities_of_every_label(run, capsys):
    picture = str(run / "photo.png")
    assert predict([f"--model={run}/run", "--labels=red apple,dog face", "--json", picture]) == 0
    probabilities = json.loads(capsys.readouterr().out)[picture]
    assert probabilities.keys() == {"red apple", "dog face"}
    assert sum(probabilities.values()) == pytest.approx(1)


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
        ([f"--model={run}/run", "--labels=a", str(run)], str(run)),
    ]:
        assert predict(arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert expected in line


def test_a_transparent_picture_is_the_same_by_path_and_as_an_image(run):
    path = run / "transparent.png"
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(path)
    by_path, as_image, white = clip_jax.load(run / "run").encode_image(
        [path, Image.open(path), Image.new("RGB", (20, 20), "white")]
    )
    np.testing.assert_array_equal(by_path, as_image)
    np.testing.assert_array_equal(by_path, white)


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
