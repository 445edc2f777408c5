"""The tower of docs/design.md is trained, resumed, planned, evaluated and saved without a line of ``clip_jax/``."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax.config import flatten, validate
from clip_jax.evaluate import main as evaluate
from clip_jax.main import main, parse_arguments
from clip_jax.models.clip import CLIP, example_inputs
from clip_jax.models.presets import model_preset
from clip_jax.models.towers import IMAGE_TOWERS, TEXT_TOWERS
from clip_jax.plan import main as plan
from clip_jax.planning.compiled import kept_bytes
from clip_jax.planning.model_flops import step_flops
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import abstract_state, make_model
from clip_jax.weights import Weights, WeightsError, read_weights, write_weights
from clip_jax.weights.resizing import at_image_size

pytestmark = pytest.mark.usefixtures("one_device")

DOCUMENT = pathlib.Path(__file__).parent.parent.parent / "docs" / "design.md"
SETTINGS = (
    "--config.data.source=emoji:noto/held_out",
    "--config.data.num_workers=0",
    "--config.global_batch_size=16",
    "--config.steps=5",
    "--config.log_every=1",
    "--config.checkpoint_every=4",
    "--config.optimizer.warmup_steps=1",
    "--config.model.dtype=float32",
    "--config.model.text.width=16",
)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """The command line of a training with the block as its config file."""
    text = DOCUMENT.read_text(encoding="utf-8")
    block = text.partition("\n## How to add a tower\n")[2].partition("\n```python\n")[2].partition("```\n")[0]
    assert sum(bool(line.strip()) for line in block.splitlines()) < 30
    file = tmp_path_factory.mktemp("extending") / "thumbnail.py"
    file.write_text(block)
    towers = dict(IMAGE_TOWERS)
    yield [f"--config={file}", *SETTINGS]
    IMAGE_TOWERS.clear()
    IMAGE_TOWERS.update(towers)


@pytest.fixture
def config(arguments):
    return parse_arguments(arguments)[0]


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main([*arguments, f"--workdir={folder}"]) == 0
    return folder


def losses(run: pathlib.Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def test_a_run_is_saved_and_resumed_with_the_same_loss(run, arguments, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = losses(copy)
    assert sorted(before) == [1, 2, 3, 4, 5]
    shutil.rmtree(copy / "checkpoints" / "5")
    assert main([*arguments, f"--workdir={copy}"]) == 0
    assert "resumed at step 4 of 5" in capsys.readouterr().out
    assert losses(copy) == before
    assert main([*arguments, f"--workdir={copy}", "--config.model.vision.thumbnail_size=4"]) == 2
    assert "model.vision.thumbnail_size was 8 and is 4" in capsys.readouterr().err


def test_a_run_is_evaluated_with_a_probe_of_the_towers_own_output(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert evaluate([f"--model={run}", "--tasks=emoji_unseen_both", f"--data={tmp_path}"]) == 0
    assert "emoji_unseen_both" in capsys.readouterr().out
    model = clip_jax.load(str(run))
    assert "custom (thumbnail)" in repr(model)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    features = model.embedder.image_features(images)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(features / lengths, model.embedder.encode_image(images), rtol=0, atol=1e-5)


def test_a_step_is_planned_with_the_towers_own_flops(config, arguments, mesh_of, capsys):
    preset = model_preset(config)
    flops = step_flops(preset, 16)
    assert flops["vision tower"] == 16 * 2 * 2 * (3 * 8 * 8) * 64
    mesh = mesh_of((1, 1))
    state = abstract_state(make_model(config, mesh), make_optimizer(config.optimizer, 5), mesh)
    images, tokens = example_inputs(preset)
    batch = {"image": jax.ShapeDtypeStruct((16, *images.shape[1:]), np.uint8), "tokens": tokens}
    batch["tokens"] = jax.ShapeDtypeStruct((16, *tokens.shape[1:]), np.int32)
    assert kept_bytes(config, mesh, state, batch)["none"] > 0
    assert plan([*arguments, "--topology=v5e:2x2", "--config.model.patch_dropout=0.5"]) == 2
    assert "config.model.patch_dropout: a thumbnail has no patches to leave out" in capsys.readouterr().err


def test_its_config_is_checked_as_every_towers(config):
    assert config.model.name == "custom"
    assert (config.optimizer.beta2, config.optimizer.epsilon) == (0.98, 1e-6)
    config.model.vision.thumbnail_size = 0
    with pytest.raises(ValueError, match=r"^config\.model\.vision\.thumbnail_size=0 must be positive$"):
        validate(config)
    config.model.vision.unlock()
    del config.model.vision.thumbnail_size
    with pytest.raises(ValueError, match=r"^config\.model\.vision has the fields image_size, of no one tower; the t"):
        validate(config)


def test_its_weights_are_written_for_this_project_and_refused_for_others(run, tmp_path):
    weights = read_weights(run)
    write_weights(weights, tmp_path / "copy", "clip_jax")
    copy = read_weights(tmp_path / "copy")
    assert copy.preset == weights.preset and type(copy.preset.vision).name == "thumbnail"
    jax.tree.map(np.testing.assert_array_equal, copy.variables, weights.variables)
    for name, file in (("huggingface", "hf"), ("open_clip", "oc"), ("openai", "oa.pt")):
        with pytest.raises(WeightsError, match=r"has no thumbnail, .*; write --to=clip_jax$"):
            write_weights(Weights(*weights), tmp_path / file, name)


def test_without_positions_a_model_is_the_same_at_another_image_size(run):
    weights = read_weights(run)
    vision = dataclasses.replace(weights.preset.vision, image_size=64)
    larger = dataclasses.replace(weights.preset, vision=vision)
    assert at_image_size(weights.variables, weights.preset, larger) is weights.variables


def test_the_fields_of_a_section_name_one_tower_alone(config):
    for towers in (IMAGE_TOWERS, TEXT_TOWERS):
        fields = [frozenset(field.name for field in dataclasses.fields(tower)) for tower in towers.values()]
        assert len(set(fields)) == len(fields)
        assert all(name == tower.name for name, tower in towers.items())


def test_the_module_is_the_one_that_the_composition_builds(config):
    preset = model_preset(config)
    params = jax.eval_shape(CLIP(preset).init, jax.random.key(0), *example_inputs(preset))["params"]
    assert set(params) == {"vision", "text", "logit_scale"}
    assert {"vision.thumbnail_size", "vision.image_size"} <= flatten(config.model).keys()
