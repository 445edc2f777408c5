"""Weights from elsewhere are converted, used and trained on; those trained here go elsewhere."""

import contextlib
import io
import pathlib
import shutil

import numpy as np
import pytest
from goldens import assert_same_tensors, compute, flat, unpack
from PIL import Image
from safetensors.numpy import load_file
from trial import SMALL, losses, run

from clip_jax.convert import loading_example
from clip_jax.convert import main as convert
from clip_jax.main import main as train
from clip_jax.main import parse_arguments
from clip_jax.models.preprocessing import Preprocessing
from clip_jax.models.presets import model_preset
from clip_jax.predict import main as predict
from clip_jax.training.feed import Feed
from clip_jax.training.preparation import prepare, read_initial_variables
from clip_jax.weights import Weights, read_weights
from clip_jax.weights.resizing import at_image_size

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def goldens(tmp_path_factory):
    return unpack(tmp_path_factory.mktemp("goldens"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps from another seed than that of the tests below."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert train([*SMALL, "--config.steps=2", "--config.seed=1", f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def converted(trained, tmp_path_factory):
    """The same model as a folder of ours, by way of a single file."""
    folder = tmp_path_factory.mktemp("converted")
    assert convert([str(trained), str(folder / "model.safetensors"), "--to=open_clip"]) == 0
    assert convert([str(folder / "model.safetensors"), str(folder / "ours")]) == 0
    return folder / "ours"


@pytest.mark.parametrize(
    ("format", "destination", "use"),
    [
        ("clip_jax", "vit", 'clip_jax.load("{path}")'),
        ("open_clip", "vit", 'open_clip.create_model_and_transforms("local-dir:{path}")'),
        (
            "open_clip",
            "vit.safetensors",
            "open_clip has no name for it and needs a folder: "
            "python -m clip_jax.convert {path} {folder} --to=open_clip",
        ),
        ("huggingface", "vit", 'transformers.CLIPModel.from_pretrained("{path}")'),
        ("openai", "vit.pt", 'clip.load("{path}")'),
    ],
)
def test_a_conversion_says_what_the_model_is_and_how_to_use_it(
    goldens,
    tmp_path,
    capsys,
    format,  # noqa: A002
    destination,
    use,
):
    golden, path = goldens["openai_vit/archive"], tmp_path / "new" / destination
    assert convert([str(golden.path), str(path), f"--to={format}"]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    count = sum(tensor.size for tensor in golden.tensors().values() if tensor.dtype != np.int64)
    assert output.splitlines() == [
        f"custom, {count:,} parameters, from OpenAI to {path}",
        f"Use it:  {use.format(path=path, folder=path.with_suffix(''))}",
    ]
    assert read_weights(path).preset == read_weights(golden.path).preset
    assert sorted(entry.name for entry in path.parent.iterdir()) == [destination]


@pytest.mark.parametrize(
    ("name", "params", "arguments"),
    [
        ("ViT-B/32", {}, '"ViT-B-32-quickgelu"'),
        ("ViT-L/14@336 with gelu", {}, '"ViT-L-14-336"'),
        ("RN50x4", {}, '"RN50x4-quickgelu"'),
        ("ViT-S/16", {}, '"ViT-S-16", force_quick_gelu=True'),
        ("ViT-S/16 with gelu", {"logit_bias": -9.5}, '"ViT-S-16", init_logit_bias=-10'),
    ],
)
def test_a_file_for_open_clip_is_used_by_open_clips_name(name, params, arguments):
    use = loading_example(name, params, Preprocessing(), 'a "b.safetensors', "open_clip")
    assert use == f'open_clip.create_model_and_transforms({arguments}, pretrained="a \\"b.safetensors")'


def test_wrong_flags_are_one_line(capsys):
    assert convert(["a", "b", "--to=tensorflow"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: argument --to: invalid choice: 'tensorflow'")


def test_the_buffers_of_a_resnet_are_no_parameters(goldens, tmp_path, capsys):
    assert convert([str(goldens["openai_resnet/archive"].path), str(tmp_path / "a")]) == 0
    tensors = goldens["openai_resnet/float32"].tensors()
    count = sum(array.size for name, array in tensors.items() if not name.endswith(("_mean", "_var", "_tracked")))
    assert f"{count:,} parameters" in capsys.readouterr().out


def test_the_activation_of_a_bare_file_is_noted_or_said(goldens, tmp_path, capsys):
    source = str(goldens["openai_vit/float32"].path)
    assert convert([source, str(tmp_path / "assumed")]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("note: float32.pt does not tell its activation")
    assert "how images are prepared" in line
    assert convert([source, str(tmp_path / "said"), "--activation=gelu"]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert "attention heads" in line and "how images are prepared" in line and "activation" not in line
    activations = [read_weights(tmp_path / name).preset.text.activation for name in ("assumed", "said")]
    assert activations == ["quick_gelu", "gelu"]


def test_a_run_is_converted_whole(trained, converted):
    run, ours = read_weights(trained), read_weights(converted)
    assert (run.format, ours.format, ours.preset) == ("clip_jax", "clip_jax", run.preset)
    for name, array in flat(run.variables).items():
        np.testing.assert_array_equal(flat(ours.variables)[name], array)


def test_predict_takes_a_converted_model(converted, tmp_path, capsys):
    Image.new("RGB", (20, 30), "red").save(tmp_path / "photo.png")
    assert predict([f"--model={converted}", "--labels=red,blue", str(tmp_path / "photo.png")]) == 0
    assert "%" in capsys.readouterr().out


def test_a_converted_folder_is_no_workdir_but_one_to_start_from(converted, tmp_path, capsys):
    before = sorted((path, path.stat().st_mtime_ns) for path in converted.rglob("*"))
    assert train([*SMALL, "--config.steps=1", f"--workdir={converted}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "converted from open_clip, not a run" in line
    assert f"--config.init_from={converted}" in line
    assert sorted((path, path.stat().st_mtime_ns) for path in converted.rglob("*")) == before


def contrastive_loss(logits: np.ndarray) -> float:
    """Symmetric cross-entropy of logits whose pairs stand on the diagonal."""

    def cross_entropy(rows):
        return np.mean(np.log(np.exp(rows).sum(axis=1)) - np.diag(rows))

    return (cross_entropy(np.float64(logits)) + cross_entropy(np.float64(logits).T)) / 2


@pytest.fixture(scope="module")
def started(converted, tmp_path_factory):
    """The arguments of a training of four steps at twice the image size, and the model that it started from."""
    folder = tmp_path_factory.mktemp("started")
    shutil.copytree(converted, folder / "source")
    arguments = [*SMALL, "--config.steps=4", "--config.checkpoint_every=2", "--config.model.vision.image_size=32"]
    arguments += [f"--config.init_from={folder}/source", f"--workdir={folder}/run"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert train(arguments) == 0
    assert f"starts from {folder}/source" in output.getvalue()
    return arguments, read_weights(folder / "source")


def test_a_training_at_another_image_size_starts_with_the_loss_of_the_model_that_it_starts_from(started):
    arguments, source = started
    config, workdir, _ = parse_arguments(arguments)
    feed = Feed(prepare(config, workdir), 0)
    batch = feed.next(0).inputs
    feed.close()
    preset = model_preset(config)
    assert (source.preset.vision.image_size, preset.vision.image_size) == (16, 32)
    variables = at_image_size(source.variables, source.preset, preset)
    logits = compute(Weights(preset, variables, "test"), batch["image"], batch["tokens"])["logits"]
    assert losses(pathlib.Path(workdir))[1] == pytest.approx(contrastive_loss(logits), rel=1e-5)
    assert read_weights(workdir).preset == preset


def test_a_training_that_was_ended_resumes_without_what_it_started_from(started, capsys):
    arguments, _ = started
    workdir = pathlib.Path(parse_arguments(arguments)[1])
    undisturbed = losses(workdir)
    shutil.rmtree(workdir.parent / "source")
    shutil.rmtree(workdir / "checkpoints/4")
    assert train(arguments) == 0
    output = capsys.readouterr().out
    assert "resumed at step 2 of 4" in output
    assert "starts from" not in output
    assert losses(workdir) == undisturbed


def test_another_loss_starts_with_the_same_towers_and_a_bias_and_temperature_of_its_own(trained, tmp_path):
    before = flat(read_weights(trained).variables)
    sigmoid = [*SMALL, "--config.loss.kind=sigmoid", "--config.steps=1", f"--config.init_from={trained}"]
    workdir = tmp_path / "sigmoid"
    config, _, _ = parse_arguments([*sigmoid, f"--workdir={workdir}"])
    started = flat(read_initial_variables(config))
    assert started.pop("params.logit_bias") == -10
    assert started.pop("params.logit_scale") == pytest.approx(np.log(10))
    assert_same_tensors(started, {name: leaf for name, leaf in before.items() if name != "params.logit_scale"})

    assert train([*sigmoid, f"--workdir={workdir}"]) == 0
    after = flat(read_weights(workdir).variables)
    config, _, _ = parse_arguments([*SMALL, f"--config.init_from={workdir}", f"--workdir={tmp_path}/softmax"])
    back = flat(read_initial_variables(config))
    assert back["params.logit_scale"] == pytest.approx(np.log(1 / 0.07))
    assert after.pop("params.logit_bias") is not None
    assert_same_tensors(back, after | {"params.logit_scale": back["params.logit_scale"]})


@pytest.mark.parametrize("kind", ["run", "ours", "model.safetensors"])
def test_a_training_of_the_same_image_size_starts_with_the_very_weights(trained, converted, tmp_path, kind):
    source = trained if kind == "run" else converted.parent / kind
    config, _, _ = parse_arguments([*SMALL, f"--config.init_from={source}", f"--workdir={tmp_path}/run"])
    assert_same_tensors(flat(read_initial_variables(config)), flat(read_weights(trained).variables))


@pytest.mark.parametrize(
    ("init_from", "argument", "words"),
    [
        ("none", "--config.steps=1", ["there is no such file or folder"]),
        ("", "--config.steps=1", ["holds no model"]),
        ("ours", "--config.model.embed_dim=8", ["embed_dim is 16 there and 8 here"]),
        ("ours", "--config.model.text.activation=gelu", ["text.activation is quick_gelu there and gelu here"]),
        ("ours", "--config.model.vision.patch_size=4", ["vision.patch_size is 8 there and 4 here"]),
    ],
)
def test_a_model_that_cannot_be_started_from_is_one_line(converted, tmp_path, capsys, init_from, argument, words):
    source = converted.parent / init_from
    assert train([*SMALL, argument, f"--config.init_from={source}", f"--workdir={tmp_path}/run"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert all(word in line for word in [f"config.init_from={source}", *words]), line
    assert not (tmp_path / "run").exists()


RESNET = """
from clip_jax.config import default_config


def get_config():
    config = default_config("RN50")
    config.model.embed_dim = 16
    config.model.dtype = "float32"
    config.model.vision.update(image_size=32, width=4, num_heads=2)
    config.model.text.update(width=16, num_layers=1, num_heads=2, context_length=16)
    config.optimizer.warmup_steps = 1
    config.data.source = "emoji:noto/train"
    config.data.num_workers = 0
    config.global_batch_size = 16
    config.log_every = 1
    config.steps = 3
    return config
"""


def test_a_resnet_is_trained_used_and_converted(tmp_path, capsys, monkeypatch):
    (tmp_path / "small_resnet.py").write_text(RESNET)
    workdir = tmp_path / "run"
    arguments = [f"--config={tmp_path}/small_resnet.py", "--config.model.vision.stage_sizes=1,2,1,1"]
    # In a process of its own, which does not optimize the program in the nightly tests either.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    run(*arguments, f"--workdir={workdir}")
    assert sorted(losses(workdir)) == [1, 2, 3]
    assert all(1 < loss < 10 for loss in losses(workdir).values())
    Image.new("RGB", (20, 30), "red").save(tmp_path / "photo.png")
    assert predict([f"--model={workdir}", "--labels=red,blue", str(tmp_path / "photo.png")]) == 0
    assert convert([str(workdir), str(tmp_path / "open_clip"), "--to=open_clip"]) == 0
    assert "custom, " in capsys.readouterr().out

    tensors = load_file(tmp_path / "open_clip/open_clip_model.safetensors")
    counters = {name: int(count) for name, count in tensors.items() if name.endswith("num_batches_tracked")}
    assert set(counters.values()) == {3}
    assert len(counters) == 3 + 3 * 5 + 4  # of the stem, the blocks and the shortcuts
    assert all(np.abs(tensors[name.replace("num_batches_tracked", "running_mean")]).max() > 1e-4 for name in counters)

    weights = read_weights(workdir)
    back = read_weights(tmp_path / "open_clip")
    assert back.preset == weights.preset
    assert_same_tensors(flat(back.variables), flat(weights.variables))
    continued = [*arguments, f"--config.init_from={tmp_path}/open_clip", f"--workdir={tmp_path}/continued"]
    config, _, _ = parse_arguments(continued)
    assert_same_tensors(flat(read_initial_variables(config)), flat(weights.variables))
