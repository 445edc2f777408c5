"""A training step is the same function however the devices are laid out, and against the loss written plainly."""

import copy
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_training import initial_state, tiny_batch
from trees import adam_state, assert_trees_close

from clip_jax.losses.softmax import softmax_loss
from clip_jax.models.clip import normalize_images
from clip_jax.models.preprocessing import Preprocessing
from clip_jax.sharding import batch_sharding, to_global_batch
from clip_jax.training import state
from clip_jax.training.accumulation import join_parts, split_into_parts
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import abstract_state, configured_mesh, create_state, make_model
from clip_jax.training.step import losses_by_source, make_train_step

MESHES = [*(pytest.param(shape, marks=pytest.mark.slow) for shape in ((8, 1), (4, 2), (1, 8))), (2, 4)]
STEPS = 8


@pytest.fixture(scope="module")
def trained(tiny_config, mesh_of):
    """A function from a mesh's shape to a short training on it, done once: its step, and what it gave."""
    config = tiny_config
    optimizer = make_optimizer(config.optimizer, 100)

    @functools.cache
    def train(shape):
        mesh = mesh_of(shape)
        model = make_model(config, mesh)
        state = initial_state(model, optimizer, mesh)
        result = {"mesh": mesh, "model": model, "optimizer": optimizer, "start": jax.tree.map(np.asarray, state)}
        result["step"] = make_train_step(config, model, optimizer, mesh)
        curve = []
        for step in range(STEPS):
            arrays = to_global_batch(tiny_batch(step), mesh)
            state, metrics = result["step"](state, arrays)
            curve.append(jax.device_get(metrics))
            if step == 0:
                result["after_one"] = jax.tree.map(np.asarray, state)
        return result | {"curve": curve, "state": state}

    return train


def moments(state):
    """Adam's means of the gradients and of their squares."""
    adam = adam_state(state.opt_state)
    return adam.mu, adam.nu


@pytest.fixture(scope="module")
def plain(trained):
    """The first batch's loss and gradients, with all the similarities on one device."""
    run, arrays = trained((1, 1)), tiny_batch(0)

    def loss(params):
        images = normalize_images(jnp.asarray(arrays["image"]), Preprocessing())
        return softmax_loss(*run["model"].apply({"params": params}, images, arrays["tokens"]))

    return jax.jit(jax.value_and_grad(loss))(run["start"].params)


@pytest.mark.parametrize("shape", [(1, 1), *MESHES])
def test_gradients_on_every_mesh_are_those_of_the_loss_written_plainly(trained, plain, shape):
    run, (loss, gradients) = trained(shape), plain
    assert run["curve"][0]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert run["curve"][0]["gradient_norm"] == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-4)
    mean, _ = moments(run["after_one"])
    assert_trees_close(jax.tree.map(lambda m: m / (1 - 0.9), mean), gradients, rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "parts", "form"),
    [
        ((1, 1), 4, "gather"),
        ((2, 4), 2, "blockwise"),
        pytest.param((1, 1), 16, "gather", marks=pytest.mark.slow),
        pytest.param((1, 1), 4, "blockwise", marks=pytest.mark.slow),
        pytest.param((2, 4), 2, "gather", marks=pytest.mark.slow),
        pytest.param((8, 1), 2, "gather", marks=pytest.mark.slow),
    ],
)
def test_a_batch_in_parts_takes_the_step_of_the_whole_batch(trained, tiny_config, shape, parts, form):
    run = trained(shape)
    config = copy.deepcopy(tiny_config)
    config.accumulation_steps, config.loss.form, config.loss.block_size = parts, form, 3
    step = make_train_step(config, run["model"], run["optimizer"], run["mesh"])
    state = initial_state(run["model"], run["optimizer"], run["mesh"])
    arrays = to_global_batch(tiny_batch(0), run["mesh"])
    state, metrics = step(state, arrays)
    expected = run["after_one"]
    for name, value in run["curve"][0].items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4), name
    for result, whole in zip(moments(state), moments(expected), strict=True):
        assert_trees_close(jax.tree.map(np.asarray, result), whole, rtol=1e-4)
    by_scale = moments(state)[0]["logit_scale"], moments(expected)[0]["logit_scale"]
    assert float(by_scale[0]) == pytest.approx(float(by_scale[1]), rel=1e-4)
    assert float(by_scale[1]) != 0


def test_parts_keep_every_row_on_its_device(mesh_of):
    mesh = mesh_of((2, 4))
    rows = jax.device_put(np.arange(32), batch_sharding(mesh))
    program = jax.jit(lambda rows: split_into_parts(rows, 2, mesh)).lower(rows).compile()
    parts = program(rows)
    assert "collective" not in program.as_text() and "all-" not in program.as_text()
    before = {shard.device: set(np.ravel(shard.data).tolist()) for shard in rows.addressable_shards}
    after = {shard.device: set(np.ravel(shard.data).tolist()) for shard in parts.addressable_shards}
    assert before == after
    np.testing.assert_array_equal(jax.jit(lambda parts: join_parts(parts, mesh))(parts), rows)


def test_the_initialization_is_traced_once(tiny_config, mesh_of, monkeypatch):
    traced, init = [], state._init_variables
    monkeypatch.setattr(state, "_init_variables", lambda *arguments: traced.append(1) or init(*arguments))
    mesh = mesh_of((1, 1))
    model, optimizer = make_model(tiny_config, mesh), make_optimizer(tiny_config.optimizer, 100)
    abstract_state(model, optimizer, mesh)
    create_state(model, optimizer, 0, mesh)
    assert len(traced) == 1


def test_a_new_state_is_that_of_the_seed_on_any_mesh(trained):
    run = trained((2, 4))
    state = create_state(run["model"], run["optimizer"], 0, run["mesh"])
    assert_trees_close(jax.tree.map(np.asarray, state), run["start"], rtol=1e-6)
    same = jax.tree.map(lambda one, two: one.sharding.is_equivalent_to(two.sharding, one.ndim), state, run["state"])
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("shape", MESHES)
def test_eight_devices_train_as_one_does(trained, shape):
    one, eight = trained((1, 1)), trained(shape)
    for name in ("loss", "logit_scale", "gradient_norm", "image_to_text_accuracy", "text_to_image_accuracy"):
        curves = [[float(metrics[name]) for metrics in run["curve"]] for run in (eight, one)]
        np.testing.assert_allclose(*curves, rtol=1e-3)
    assert_trees_close(eight["state"].params, one["state"].params, rtol=2e-3)
    assert eight["state"].step == STEPS


def test_metrics_are_float32_scalars_and_the_temperature_is_told_as_multiplied(trained):
    metrics = trained((2, 4))["curve"][0]
    assert metrics.keys() == {
        "loss",
        "logit_scale",
        "gradient_norm",
        "image_to_text_accuracy",
        "text_to_image_accuracy",
    }
    assert all(value.shape == () and value.dtype == np.float32 for value in metrics.values())
    assert metrics["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)


@pytest.mark.parametrize("shape", MESHES)
def test_parameters_and_both_moments_are_split_along_embed_over_fsdp(trained, shape):
    run, fsdp = trained(shape), shape[1]
    state = run["state"]
    for tree in (state.params, *moments(state)):
        text, vision = tree["text"], tree["vision"]
        blocks = vision["transformer"]["blocks"]
        for array, whole, axis in (
            (text["token_embedding"], (64, 24), 1),
            (text["projection"]["kernel"], (24, 16), 0),
            (vision["patch_embedding"]["kernel"], (192, 32), 1),
            (vision["class_embedding"], (32,), 0),
            (blocks["qkv"]["kernel"], (2, 32, 96), 1),
            (blocks["attention_output"]["kernel"], (2, 32, 32), 2),
            (blocks["attention_output"]["bias"], (2, 32), 1),
            (blocks["fc1"]["kernel"], (2, 32, 128), 1),
            (blocks["fc2"]["kernel"], (2, 128, 32), 2),
            (blocks["ln_1"]["scale"], (2, 32), 1),
        ):
            part = tuple(size // fsdp if place == axis else size for place, size in enumerate(whole))
            assert array.shape == whole
            assert [shard.data.shape for shard in array.addressable_shards] == [part] * 8
        assert blocks["fc1"]["bias"].sharding.is_fully_replicated
        assert tree["logit_scale"].sharding.is_fully_replicated


def test_the_abstract_state_is_the_state_without_its_numbers(trained):
    run = trained((2, 4))
    abstract = abstract_state(run["model"], run["optimizer"], run["mesh"])

    def check(promised, array):
        assert (promised.shape, promised.dtype) == (array.shape, array.dtype)
        assert promised.sharding.is_equivalent_to(array.sharding, array.ndim)

    jax.tree.map(check, abstract, run["state"])


def fresh(run, **params):
    arrays = to_global_batch(tiny_batch(0), run["mesh"])
    start = run["start"]._replace(params=run["start"].params | params)
    state = jax.tree.map(lambda array, like: jax.device_put(array, like.sharding), start, run["state"])
    return state, arrays


@pytest.mark.parametrize(("before", "after"), [(5.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)])
def test_the_temperature_is_kept_between_1_and_100(trained, before, after):
    run = trained((2, 4))
    state, metrics = run["step"](*fresh(run, logit_scale=np.float32(before)))  # the rate of the first step is 0
    assert state.params["logit_scale"] == pytest.approx(after, rel=1e-6)
    assert metrics["logit_scale"] == pytest.approx(math.exp(before), rel=1e-5)


def test_the_temperature_is_learned(trained):
    run = trained((2, 4))
    assert abs(run["state"].params["logit_scale"] - run["start"].params["logit_scale"]) > 1e-4


def test_the_loss_of_a_source_is_the_mean_over_its_own_pairs():
    losses = losses_by_source(jnp.float32([1, 2, 4, 8]), jnp.int32([0, 2, 0, 2]), ("a", "b", "c"))
    assert (losses["loss/a"], losses["loss/c"]) == (2.5, 5) and np.isnan(losses["loss/b"])


def test_the_old_state_is_given_up_to_the_new_one(trained):
    run = trained((2, 4))
    state, arrays = fresh(run)
    run["step"](state, arrays)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, moments(state))))
    assert not arrays["image"].is_deleted()


def test_a_batch_seen_again_and_again_is_learnt_by_heart(trained):
    run = trained((2, 4))
    state, arrays = fresh(run)
    for _ in range(60):
        state, metrics = run["step"](state, arrays)
        # Virtual devices of which some run many steps ahead deadlock in their collectives.
        jax.block_until_ready(metrics)
    assert run["curve"][0]["loss"] > 1.5
    assert metrics["loss"] < 0.2
    assert metrics["image_to_text_accuracy"] == metrics["text_to_image_accuracy"] == 1


@pytest.mark.parametrize("row_major", [False, True])
def test_parameters_travel_between_the_parts_of_a_mesh_and_activations_stay(tiny_config, mesh_of, row_major):
    """Left to itself the compiler all-reduces activations of the whole batch, which then grow with fsdp.

    Told their layout, as for GPUs, it would gather them.
    """
    mesh = mesh_of((1, 8))
    model, optimizer = make_model(tiny_config, mesh), make_optimizer(tiny_config.optimizer, 100)
    model = model.clone(execution=dataclasses.replace(model.execution, row_major=row_major))
    step = make_train_step(tiny_config, model, optimizer, mesh)
    shapes = {"image": ((40, 16, 16, 3), np.uint8), "tokens": ((40, 8), np.int32)}
    arrays = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    program = step.lower(abstract_state(model, optimizer, mesh), arrays).compile().as_text()
    collectives = re.findall(r"= (\S+\[[\d,]*\]).* (all-reduce|all-gather|all-to-all|reduce-scatter)\(", program)
    # 40 pairs of 5 patches or 8 tokens, whole or merged: sizes that no parameter has. Token ids may be gathered.
    for shape, kind in collectives:
        sizes = [int(size) for size in re.findall(r"\d+", shape.partition("[")[2])]
        if shape.startswith(("f32", "(f32")):
            assert not {200, 320} & set(sizes), (kind, shape)
            assert sizes[:2] not in ([40, 5], [40, 8]), (kind, shape)
    # The lookup in the token embeddings, which are split by width, and its gradient.
    assert sum(kind == "all-to-all" for _, kind in collectives) == 2


def test_the_mesh_follows_from_the_model_and_the_memory_unless_the_config_says(tiny_config):
    config = copy.deepcopy(tiny_config)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_parameters(config)))
    assert dict(configured_mesh(config).shape) == {"data": 8, "fsdp": 1}  # a CPU tells no memory
    devices = jax.devices()
    for moment, size in (("float32", 16), ("bfloat16", 14)):
        config.optimizer.first_moment_dtype = moment
        share = 4 * size * parameters / 2  # a quarter of this holds half of the state
        assert configured_mesh(config, devices, share).shape["fsdp"] == 2
        assert configured_mesh(config, devices, share - 4).shape["fsdp"] == 4
    config.mesh.fsdp = 8
    assert configured_mesh(config, devices, share).shape["fsdp"] == 8


def abstract_parameters(config):
    mesh = configured_mesh(config)
    return abstract_state(make_model(config, mesh), make_optimizer(config.optimizer, 100), mesh).params


def compiled_step(config, mesh):
    """A function that returns the new state and metrics after the first batch.

    Its arguments are an order of the batch, if another is wanted, and changed parts of the state.
    """
    model, optimizer = make_model(config, mesh), make_optimizer(config.optimizer, 100)
    step = make_train_step(config, model, optimizer, mesh)

    def take(order=slice(None), **changes):
        state = initial_state(model, optimizer, mesh)._replace(**changes)
        arrays = {name: array[order] for name, array in tiny_batch(0).items()}
        return step(state, to_global_batch(arrays, mesh))

    return take


def test_which_patches_of_a_pair_are_left_out_does_not_depend_on_its_place_in_the_batch(trained, tiny_config, mesh_of):
    config = copy.deepcopy(tiny_config)
    config.model.patch_dropout = 0.5
    step = compiled_step(config, mesh_of((1, 1)))
    before, after = step(), step(order=np.random.default_rng(5).permutation(16))
    assert float(after[1]["loss"]) == pytest.approx(float(before[1]["loss"]), rel=1e-5)
    assert_trees_close(moments(after[0])[0], moments(before[0])[0], rtol=1e-4)
    assert abs(trained((1, 1))["curve"][0]["loss"] - before[1]["loss"]) > 1e-3


@pytest.fixture(scope="module")
def sigmoid(tiny_config, mesh_of):
    """The config of the sigmoid loss, a mesh, and a step with it."""
    config, mesh = copy.deepcopy(tiny_config), mesh_of((1, 1))
    config.loss.kind = "sigmoid"
    return config, mesh, compiled_step(config, mesh)


def test_the_sigmoid_loss_starts_as_siglip_does_and_trains_its_bias_and_temperature(sigmoid):
    config, mesh, step = sigmoid
    model = make_model(config, mesh)
    params = initial_state(model, make_optimizer(config.optimizer, 100), mesh).params
    assert float(params["logit_scale"]) == pytest.approx(math.log(10)) and float(params["logit_bias"]) == -10
    arrays = tiny_batch(0)
    images, texts, _ = jax.jit(model.apply)(
        {"params": params}, normalize_images(arrays["image"], Preprocessing()), arrays["tokens"]
    )
    logits = 10 * np.float64(images) @ np.float64(texts).T - 10
    expected = np.log1p(np.exp(-logits * (2 * np.eye(len(logits)) - 1))).sum() / len(logits)
    state, metrics = step()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    mean, _ = moments(state)
    assert abs(mean["logit_bias"]) > 1e-4 and abs(mean["logit_scale"]) > 1e-4


def test_only_the_softmax_loss_limits_the_temperature(sigmoid):
    """The test of the temperature between 1 and 100 has the softmax loss."""
    config, mesh, step = sigmoid
    params = initial_state(make_model(config, mesh), make_optimizer(config.optimizer, 100), mesh).params
    state, _ = step(params=params | {"logit_scale": jnp.float32(7)})
    assert float(state.params["logit_scale"]) == pytest.approx(7, rel=1e-6)  # the first step's rate is 0
