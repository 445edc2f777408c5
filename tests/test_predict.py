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


def test_a_finished_run_leaves_all_that_it_promises(run):
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


def test_one_label_and_one_template_are_not_taken_apart_into_letters(run):
    model = clip_jax.load(run / "run")
    np.testing.assert_array_equal(model.classify(run / "photo.png", "cat", "a {}"), [[1]])
    pictures = (path for path in [run / "photo.png"] * 2)
    labels = (label for label in ["cat", "dog", "house"])
    assert model.classify(pictures, labels).shape == (2, 3)


@pytest.mark.parametrize(
    "picture",
    [np.zeros((0, 0, 3), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), Image.new("RGB", (0, 5))],
    ids=["empty array", "floats", "two channels", "empty picture"],
)
def test_what_is_no_picture_is_refused(run, picture):
    with pytest.raises(ValueError, match="picture"):
        clip_jax.load(run / "run").encode_image([picture])


def test_a_loaded_model_takes_texts_or_tokens(run):
    model = clip_jax.load(run / "run", batch_size=2)
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
def test_options_of_load_that_make_no_sense_are_refused(run, options):
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
