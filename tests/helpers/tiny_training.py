"""A model that compiles in a second and a short training of it, for tests in this process and in others."""

import functools

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from clip_jax.config import default_config
from clip_jax.models.clip import CLIP, example_inputs
from clip_jax.sharding import replicated, to_global_batch
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import TrainState, abstract_state, make_model
from clip_jax.training.step import make_train_step

BATCH_SIZE = 16


def tiny_config() -> ml_collections.ConfigDict:
    """A whole config whose model compiles in a second: 4 patches of 8 x 8, 8 tokens of a vocabulary of 64."""
    config = default_config("ViT-tiny")
    config.global_batch_size = BATCH_SIZE
    config.model.embed_dim = 16
    config.model.dtype = "float32"
    config.model.vision.update(image_size=16, patch_size=8, width=32, num_layers=2, num_heads=2)
    config.model.text.update(width=24, num_layers=2, num_heads=2, context_length=8, vocab_size=64)
    # The gradient by a key's bias is 0 but for rounding, of which Adam with a small epsilon makes whole steps.
    config.optimizer.update(learning_rate=1e-3, warmup_steps=2, epsilon=1e-4)
    return config


def tiny_batch(seed: int) -> dict[str, np.ndarray]:
    """Images uint8 ``[16, 16, 16, 3]``, tokens int32 ``[16, 8]`` and seeds uint32 ``[16]``."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, 63, (BATCH_SIZE, 8))
    tokens[:, -1] = 63
    images = random.integers(0, 256, (BATCH_SIZE, 16, 16, 3), dtype=np.uint8)
    seeds = random.integers(2**32, size=BATCH_SIZE, dtype=np.uint32)
    return {"image": images, "tokens": tokens.astype(np.int32), "seed": seeds}


def initial_state(model: CLIP, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state of seed 0, as ``create_state`` returns it, without a program to compile for each mesh and loss."""
    variables = _initial_variables(CLIP(model.preset, loss_parameters=model.loss_parameters))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_state(model, optimizer, mesh))
    state = state._replace(params=variables["params"], batch_stats=variables.get("batch_stats", {}))
    return jax.tree.map(
        lambda array, leaf: jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index]),
        state,
        abstract_state(model, optimizer, mesh),
    )


@functools.cache
def _initial_variables(model: CLIP) -> dict:
    inputs = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), example_inputs(model.preset))
    return jax.device_get(nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), *inputs)))


def losses_and_parameters(config: ml_collections.ConfigDict, mesh: Mesh, steps: int) -> tuple[np.ndarray, dict]:
    """Trains on the devices of the mesh, all processes together; every process gets all of the result."""
    model, optimizer = make_model(config, mesh), make_optimizer(config.optimizer, 100)
    state = initial_state(model, optimizer, mesh)
    train_step = make_train_step(config, model, optimizer, mesh)
    losses, rows = [], BATCH_SIZE // jax.process_count()
    for step in range(steps):
        share = slice(rows * jax.process_index(), rows * (jax.process_index() + 1))
        batch = to_global_batch({name: array[share] for name, array in tiny_batch(step).items()}, mesh)
        state, metrics = train_step(state, batch)
        # Virtual devices of which some run many steps ahead deadlock in their collectives.
        losses.append(float(metrics["loss"]))
    params = jax.jit(lambda params: params, out_shardings=replicated(mesh))(state.params)
    return np.array(losses), jax.device_get(params)
