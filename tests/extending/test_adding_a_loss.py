"""The loss of "How to add a loss" in docs/design.md, registered without a change to clip_jax: all programs use it."""

import importlib.util
import math
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import compiled, embeddings, on_devices
from trees import assert_trees_close
from trial import REPOSITORY, SMALL
from trial import losses as losses_of_steps

import clip_jax
from clip_jax import losses
from clip_jax.config import default_config
from clip_jax.evaluate import main as evaluate
from clip_jax.main import main as train
from clip_jax.planning.topologies import parse_topology
from clip_jax.training.accumulation import loss_and_gradients
from clip_jax.weights import WeightsError, read_weights, write_weights

pytestmark = pytest.mark.usefixtures("one_device")

NAME = "two_temperatures"
LOSS = [f"--config.loss.kind={NAME}", "--config.loss.max_scale=20"]


@pytest.fixture(scope="module", autouse=True)
def added_loss(tmp_path_factory):
    """The class of the example, as a file of its own and in the registry."""
    text = (REPOSITORY / "docs/design.md").read_text(encoding="utf-8").partition("## How to add a loss")[2]
    (source,) = re.findall(r"```python\n(.*?)```", text.partition("\n## ")[0], re.DOTALL)
    assert len(source.splitlines()) < 30
    file = tmp_path_factory.mktemp("loss") / f"{NAME}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(NAME, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses.LOSSES, NAME, module.TwoTemperatures)
        yield module.TwoTemperatures


@pytest.fixture(scope="module")
def trained(added_loss, tmp_path_factory) -> list[str]:
    """The arguments of a finished training of five steps."""
    workdir = tmp_path_factory.mktemp("added") / "run"
    arguments = [*SMALL, *LOSS, "--config.steps=5", "--config.checkpoint_every=2", f"--workdir={workdir}"]
    assert train(arguments) == 0
    return arguments


def section_of(kind: str):
    section = losses.default_section()
    section.kind = kind
    return section


def workdir_of(arguments: list[str]) -> pathlib.Path:
    return pathlib.Path(arguments[-1].partition("=")[2])


def test_it_trains_and_its_parameters_are_learned_within_its_limit(trained):
    params = read_weights(workdir_of(trained)).variables["params"]
    scales = [float(params[name]) for name in ("logit_scale", "text_logit_scale")]
    assert scales[0] != scales[1]
    assert all(0 < scale <= math.log(20) and scale != np.float32(math.log(1 / 0.07)) for scale in scales)
    assert sorted(losses_of_steps(workdir_of(trained))) == [1, 2, 3, 4, 5]


def test_a_run_that_was_ended_resumes_with_the_same_losses(trained, capsys):
    workdir = workdir_of(trained)
    undisturbed = losses_of_steps(workdir)
    shutil.rmtree(workdir / "checkpoints/5")
    assert train(trained) == 0
    assert "resumed at step 4 of 5" in capsys.readouterr().out
    assert losses_of_steps(workdir) == undisturbed
    assert train([*trained[:-1], "--config.loss.max_scale=30", trained[-1]]) == 2  # it changes what is learned
    assert "loss.max_scale was 20.0 and is 30.0" in capsys.readouterr().err


def test_it_is_evaluated_loaded_and_copied_and_other_formats_refuse_it(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    workdir = workdir_of(trained)
    assert evaluate([f"--model={workdir}", "--tasks=emoji_unseen_both"]) == 0
    assert "emoji_unseen_both" in capsys.readouterr().out
    weights = read_weights(workdir)
    assert clip_jax.load(workdir).logit_scale == pytest.approx(math.exp(weights.variables["params"]["logit_scale"]))
    write_weights(weights, tmp_path / "copy", "clip_jax")
    assert read_weights(tmp_path / "copy").variables["params"].keys() == weights.variables["params"].keys()
    with pytest.raises(WeightsError, match="open_clip has no place for the loss's text_logit_scale; clip_jax has"):
        write_weights(weights, tmp_path / "other", "open_clip")


def test_accumulation_differentiates_it_as_a_whole(mesh_of):
    mesh, (images, texts) = mesh_of((1, 1)), embeddings(8, 4)
    params = {"kernel": jnp.eye(4), "logit_scale": jnp.float32(2.0), "text_logit_scale": jnp.float32(1.0)}
    loss = losses.make_loss(section_of(NAME), mesh, 8, "float32")

    def embed(params, batch_stats, batch):
        return (jnp.tanh(batch["image"] @ params["kernel"]), batch["text"]), batch_stats

    batch = {"image": jnp.float32(images), "text": jnp.float32(texts)}
    variables = {"params": params, "batch_stats": {}}
    whole, parts = (
        jax.jit(loss_and_gradients, static_argnums=(0, 1, 4, 5))(embed, loss, variables, batch, steps, mesh)
        for steps in (1, 2)
    )
    assert_trees_close(parts[2], whole[2], rtol=1e-4)
    assert all(abs(whole[2][name]) > 1e-3 for name in ("logit_scale", "text_logit_scale"))


def test_its_check_of_its_key_is_among_those_of_the_config(capsys, tmp_path):
    assert train([*SMALL, *LOSS, "--config.loss.max_scale=0.5", f"--workdir={tmp_path}/run"]) == 2
    assert capsys.readouterr().err == "error: config.loss.max_scale=0.5 must be at least 1\n"


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_on_every_mesh_it_is_the_paper_s_loss_where_both_temperatures_are_the_same(mesh_of, shape):
    mesh = mesh_of(shape)
    inputs = embeddings(16, 8)
    results = []
    for kind, names in ((NAME, ("logit_scale", "text_logit_scale")), ("softmax", ("logit_scale",))):
        loss = losses.make_loss(section_of(kind), mesh, 16, "float32")
        results.append(compiled(loss)(*on_devices(mesh, *inputs, dict.fromkeys(names, 2.0))))
    ((loss, metrics), gradients), ((expected, expected_metrics), expected_gradients) = results
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(gradients[0], expected_gradients[0], rtol=1e-3, atol=1e-6)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_the_planner_compiles_it():
    """In this process: the planner's own process knows only losses that are in clip_jax."""
    pytest.importorskip("libtpu")
    from clip_jax.planning.compiled import compile_step

    config = default_config("ViT-tiny")
    config.loss.update(kind=NAME, max_scale=20.0)
    config.global_batch_size = 64
    facts = compile_step(config.to_dict(), parse_topology("v5e:2x2"))
    assert facts["fits"] and facts["loss"] == {"form": "plain", "memory_option": ""}
