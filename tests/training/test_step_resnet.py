"""A ResNet's training step is the same function however the devices are laid out, and so are its running averages."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from trees import adam_state, assert_trees_close

from clip_jax.config import default_config
from clip_jax.models.clip import CLIP, normalize_images
from clip_jax.models.preprocessing import Preprocessing
from clip_jax.models.presets import model_preset
from clip_jax.run_folder import restore_variables
from clip_jax.sharding import to_global_batch
from clip_jax.training.checkpoint import Checkpointer
from clip_jax.training.optimizer import decay_mask, make_optimizer
from clip_jax.training.state import abstract_state, abstract_variables, make_model, state_from_variables
from clip_jax.training.step import make_train_step

MESHES = [pytest.param((8, 1), marks=pytest.mark.slow), (2, 4)]
BATCH = 56  # and 28 and 7 in a part of it: sizes that nothing but the batch has


@pytest.fixture(scope="module")
def config():
    """4 places of 256 channels in the last stage, and one block that is scanned."""
    config = default_config("RN50")
    config.model.embed_dim = 16
    config.model.dtype = "float32"
    config.model.vision.update(image_size=64, width=8, stage_sizes=(1, 2, 1, 1), num_heads=4)
    config.model.text.update(width=24, num_layers=1, num_heads=2, context_length=8, vocab_size=64)
    # The gradient by a key's bias is 0 but for rounding, of which Adam with a small epsilon makes whole steps.
    config.optimizer.update(learning_rate=1e-3, warmup_steps=0, epsilon=1e-4)
    return config


def batch():
    random = np.random.default_rng(0)
    tokens = random.integers(1, 63, (BATCH, 8), dtype=np.int32)
    tokens[:, -1] = 63
    return {"image": random.integers(0, 256, (BATCH, 64, 64, 3), dtype=np.uint8), "tokens": tokens}


@pytest.fixture(scope="module")
def start(config, mesh_of):
    """Random numpy variables: in those of a new model the residual branches, whose last gain is 0, have no gradient."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        name, shape = path[-1].key, leaf.shape
        if name == "num_batches":
            return np.full(shape, 7, np.int32)
        if name == "kernel":
            return np.float32(random.normal(0, np.prod(shape[-4 if len(shape) > 3 else -2 : -1]) ** -0.5, shape))
        if name in ("scale", "variance"):
            return np.float32(random.uniform(0.5, 1.5, shape))
        return np.float32(random.normal(0, 0.3, shape)) if shape else np.float32(2)

    mesh = mesh_of((1, 1))
    return jax.tree.map_with_path(draw, abstract_variables(make_model(config, mesh), mesh))


@pytest.fixture(scope="module")
def stepped(config, start, mesh_of):
    """A function from a mesh's shape to what one step on it gave, and the step's program."""
    optimizer = make_optimizer(config.optimizer, 100)

    @functools.cache
    def run(shape):
        mesh = mesh_of(shape)
        model = make_model(config, mesh)
        state = state_from_variables(start, model, optimizer, mesh)
        arrays = to_global_batch(batch(), mesh)
        step = make_train_step(config, model, optimizer, mesh).lower(state, arrays).compile()
        state, metrics = step(state, arrays)
        jax.block_until_ready(metrics)
        kept = {"mesh": mesh, "model": model, "optimizer": optimizer, "program": step.as_text()}
        return kept | {"state": state, "metrics": jax.device_get(metrics)}

    return run


def gradients(state):
    """From Adam's mean of them after one step."""
    return jax.tree.map(lambda mean: np.asarray(mean) / (1 - 0.9), adam_state(state.opt_state).mu)


@pytest.mark.parametrize("shape", MESHES)
def test_eight_devices_take_the_step_that_one_takes(stepped, shape):
    one, eight = stepped((1, 1)), stepped(shape)
    for name in one["metrics"]:
        assert eight["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4), name
    assert all(np.abs(gradient).max() > 0 for gradient in jax.tree.leaves(gradients(one["state"])))
    assert_trees_close(gradients(eight["state"]), gradients(one["state"]), rtol=1e-3)
    assert_trees_close(eight["state"].batch_stats, one["state"].batch_stats, rtol=1e-5)
    assert_trees_close(eight["state"].params, one["state"].params, rtol=1e-3)
    assert eight["state"].step == 1


def test_a_step_moves_the_running_averages_and_not_as_parameters_with_a_gradient(start, stepped):
    state = stepped((1, 1))["state"]
    before = jax.tree_util.tree_leaves_with_path(start["batch_stats"])
    after = jax.tree.leaves(state.batch_stats)
    assert len(before) == len(after) > 0
    for (path, old), new in zip(before, after, strict=True):
        if path[-1].key == "num_batches":
            assert (new == 8).all()
        else:
            assert (np.asarray(new) != old).mean() > 0.9
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(gradients(state))}
    assert not names & {"mean", "variance", "num_batches"}


@pytest.mark.parametrize("batch_norm", ["global", "per_device"])
def test_the_configs_batch_norm_is_what_a_step_normalizes_by(config, start, stepped, mesh_of, batch_norm):
    """The forward pass of a step; what each setting computes is told in the tests of the tower."""
    changed = config.copy_and_resolve_references()
    changed.model.vision.batch_norm = batch_norm
    mesh = mesh_of((2, 4))
    model, arrays = make_model(changed, mesh), to_global_batch(batch(), mesh)

    def forward(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"], method="encode_image")[1]

    updated = jax.jit(forward)(start, normalize_images(arrays["image"], Preprocessing()))["batch_stats"]["vision"]
    stepped_to = stepped((2, 4))["state"].batch_stats["vision"]
    # The first norm sees the same input either way: the means of the parts have the batch's mean, their variances less.
    np.testing.assert_allclose(updated["bn1"]["mean"], stepped_to["bn1"]["mean"], rtol=1e-4, atol=1e-5)
    relative = np.abs(updated["stage4_first"]["bn3"]["variance"] / stepped_to["stage4_first"]["bn3"]["variance"] - 1)
    assert (relative.max() > 1e-3) == (batch_norm == "per_device")
    assert relative.max() < 0.5


def test_the_abstract_state_is_the_state_without_its_numbers(stepped):
    run = stepped((2, 4))
    abstract = abstract_state(run["model"], run["optimizer"], run["mesh"])

    def check(promised, array):
        assert (promised.shape, promised.dtype) == (array.shape, array.dtype)
        assert promised.sharding.is_equivalent_to(array.sharding, array.ndim)

    jax.tree.map(check, abstract, run["state"])


def test_kernels_and_gains_are_split_over_fsdp_and_running_averages_are_whole(stepped):
    state = stepped((2, 4))["state"]
    vision = state.params["vision"]
    for array, part in (
        (vision["conv1"]["kernel"], (3, 3, 3, 1)),
        (vision["stage2_first"]["conv2"]["kernel"], (3, 3, 16, 4)),
        (vision["stage2_rest"]["conv3"]["kernel"], (1, 1, 1, 16, 16)),
        (vision["stage2_rest"]["bn3"]["scale"], (1, 16)),
        (vision["attention_pool"]["query"]["kernel"], (64, 256)),
        (vision["attention_pool"]["output"]["kernel"], (256, 16)),
        (vision["attention_pool"]["positional_embedding"], (5, 64)),
    ):
        assert [shard.data.shape for shard in array.addressable_shards] == [part] * 8
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.batch_stats))


@pytest.mark.parametrize("shape", MESHES)
def test_activations_of_the_image_tower_stay_on_their_device(stepped, shape):
    """Global statistics, parameters and gradients travel; left to itself the compiler would move activations, too."""
    travels = re.findall(
        r'= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)\(.*op_name="([^"]*)"',
        stepped(shape)["program"],
    )
    of_image_tower = [(kind, shapes, name) for shapes, kind, name in travels if "encode_image" in name]
    assert len(of_image_tower) > 50
    for kind, shapes, name in of_image_tower:
        sizes = [int(size) for dimensions in re.findall(r"\[([\d,]+)\]", shapes) for size in dimensions.split(",")]
        assert not any(size % 7 == 0 for size in sizes), (kind, shapes, name)


def test_running_averages_are_saved_and_restored_bit_for_bit_on_another_mesh(stepped, mesh_of, tmp_path):
    run, folder = stepped((1, 1)), epath.Path(tmp_path)
    template = abstract_state(run["model"], run["optimizer"], mesh_of((2, 4)))
    checkpointer = Checkpointer(folder, keep=1)
    checkpointer.save(1, run["state"], BATCH, "fingerprint")
    checkpointer.wait()
    restored = checkpointer.restore_latest(template).state
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, restored, run["state"])
    for leaf, promised in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
        assert leaf.sharding == promised.sharding
    variables = restore_variables(folder)
    jax.tree.map(np.testing.assert_array_equal, variables, run["state"].variables)
    assert {type(leaf) for leaf in jax.tree.leaves(variables)} == {np.ndarray}


def test_a_state_around_given_variables_is_new_but_for_them(start, stepped):
    run = stepped((2, 4))
    state = state_from_variables(start, run["model"], run["optimizer"], run["mesh"])
    jax.tree.map(np.testing.assert_array_equal, state.variables, start)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((state.step, state.opt_state)))


@pytest.mark.parametrize("boxed", [False, True])
def test_a_resnets_kernels_decay_and_neither_its_gains_biases_and_positions_nor_its_statistics(config, mesh_of, boxed):
    model = CLIP(model_preset(config))
    inputs = jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 8), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]["vision"]
    mask = nn.meta.unbox(decay_mask(params if boxed else nn.meta.unbox(params)))
    decaying = {"conv": set(), "pool": set()}
    for path, decays in jax.tree_util.tree_leaves_with_path(mask):
        names = [part.key for part in path]
        assert decays == (names[-1] == "kernel"), names
        if decays:
            decaying["pool" if names[0] == "attention_pool" else "conv"].add(".".join(names))
    assert len(decaying["conv"]) == 3 + 4 * 4 + 3  # the stem; a first block of each stage with its shortcut; one more
    assert len(decaying["pool"]) == 4


def test_a_transformers_state_has_no_running_averages(tiny_config, mesh_of):
    mesh = mesh_of((1, 1))
    state = abstract_state(make_model(tiny_config, mesh), make_optimizer(tiny_config.optimizer, 100), mesh)
    assert state.batch_stats == {}


def test_a_transformers_checkpoint_from_before_there_were_running_averages_is_still_resumed(
    tiny_config, mesh_of, tmp_path
):
    mesh, folder = mesh_of((1, 1)), epath.Path(tmp_path)
    template = abstract_state(make_model(tiny_config, mesh), make_optimizer(tiny_config.optimizer, 100), mesh)
    state = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), template)
    before = {name: value for name, value in state._asdict().items() if name != "batch_stats"}
    data = {"position": 16, "data_fingerprint": "fingerprint"}
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        manager.save(1, args=ocp.args.Composite(state=ocp.args.StandardSave(before), data=ocp.args.JsonSave(data)))
    checkpointer = Checkpointer(folder, keep=1)
    restored = checkpointer.restore_latest(template)
    checkpointer.close()
    assert (restored.position, restored.data_fingerprint) == (16, "fingerprint")
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)
    jax.tree.map(np.testing.assert_array_equal, restore_variables(folder), state.variables)
