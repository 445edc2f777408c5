"""AdamW step by step in numpy; what decays, told by name."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import adam_state

from clip_jax.config import default_config
from clip_jax.models.clip import CLIP
from clip_jax.models.presets import get_preset
from clip_jax.training.optimizer import decay_mask, learning_rate_schedule, learning_rates, make_optimizer

STEPS = 10


@pytest.fixture
def optimizer_config():
    config = default_config("ViT-tiny").optimizer
    config.update(learning_rate=0.1, warmup_steps=2, weight_decay=0.2, epsilon=1e-3)
    return config


def masks(boxed: bool):
    """Names of all parameters of a whole model, and whether each decays."""
    model = CLIP(get_preset("ViT-tiny"))
    images, tokens = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 24), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), images, tokens)["params"]
    params = params if boxed else nn.meta.unbox(params)
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(decay_mask(params)))
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return {name: (decays, shape) for name, (_, decays), shape in zip(names, leaves, shapes, strict=True)}


@pytest.mark.parametrize("boxed", [False, True])
def test_kernels_and_token_embeddings_decay_and_nothing_else(boxed):
    decaying = {name for name, (decays, _) in masks(boxed).items() if decays}
    kernels = {
        f"{tower}.transformer.blocks.{part}.kernel"
        for tower in ("vision", "text")
        for part in ("qkv", "attention_output", "fc1", "fc2")
    }
    others = {
        "vision.patch_embedding.kernel",
        "vision.projection.kernel",
        "text.projection.kernel",
        "text.token_embedding",
    }
    assert decaying == kernels | others


def test_biases_and_gains_that_scanning_made_matrices_do_not_decay():
    matrices = {name: decays for name, (decays, shape) in masks(False).items() if "blocks" in name and len(shape) == 2}
    assert len(matrices) == 2 * (4 + 4)  # four biases, two norms of two, in two towers
    assert not any(matrices.values())


def test_the_rate_rises_in_a_line_and_falls_as_half_a_cosine_to_zero(optimizer_config):
    optimizer_config.update(learning_rate=0.5, warmup_steps=20)
    rate = learning_rate_schedule(optimizer_config, 120)
    expected = [0.5 * s / 20 if s < 20 else 0.25 * (1 + math.cos(math.pi * (s - 20) / 100)) for s in range(121)]
    np.testing.assert_allclose([rate(step) for step in range(121)], expected, atol=1e-6)
    assert rate(0) == 0
    assert rate(20) == 0.5
    assert rate(120) == pytest.approx(0, abs=1e-7)


def test_a_training_shorter_than_its_warm_up_still_reaches_its_rate_and_ends_at_zero(optimizer_config):
    optimizer_config.update(learning_rate=0.5, warmup_steps=2000)
    rate = learning_rate_schedule(optimizer_config, 10)
    assert max(float(rate(step)) for step in range(11)) == 0.5
    assert rate(0) == 0
    assert rate(10) == pytest.approx(0, abs=1e-7)


def test_without_warm_up_the_first_step_has_the_whole_rate(optimizer_config):
    optimizer_config.update(learning_rate=0.5, warmup_steps=0)
    assert learning_rate_schedule(optimizer_config, 10)(0) == 0.5


def adamw_in_numpy(config, params, gradients_by_step, clip_norm=math.inf, stored=lambda mean: mean):
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for step, gradients in enumerate(gradients_by_step):
        norm = math.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        scale = min(1, clip_norm / norm)
        warmup = config.warmup_steps
        rate = config.learning_rate * (
            step / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) / 2
        )
        for name, gradient in gradients.items():
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * scale * gradient
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * (scale * gradient) ** 2
            mean = first[name] / (1 - config.beta1 ** (step + 1))
            first[name] = stored(first[name])
            variance = second[name] / (1 - config.beta2 ** (step + 1))
            decay = config.weight_decay * params[name] if name == "kernel" else 0
            params = params | {name: params[name] - rate * (mean / (np.sqrt(variance) + config.epsilon) + decay)}
    return params


@pytest.mark.parametrize("clip_norm", [0.0, 2.0])
def test_steps_are_those_of_adamw_with_decay_by_name_and_gradients_clipped_by_their_common_norm(
    optimizer_config, clip_norm
):
    random = np.random.default_rng(0)
    params = {"kernel": random.normal(size=(3, 4)), "bias": random.normal(size=(3, 4))}
    # Long and short gradients: Adam alone cancels a constant factor, so that clipping shows only if some are kept.
    lengths = (10, 0.1, 3, 0.5)
    gradients = [{name: length * random.normal(size=(3, 4)) for name in params} for length in lengths]

    optimizer_config.gradient_clip_norm = clip_norm
    optimizer = make_optimizer(optimizer_config, STEPS)
    result = jax.tree.map(jnp.float32, params)
    state = optimizer.init(result)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, result)
        result = optax.apply_updates(result, updates)

    expected = adamw_in_numpy(optimizer_config, params, gradients, clip_norm or math.inf)
    other = adamw_in_numpy(optimizer_config, params, gradients, math.inf if clip_norm else 2.0)
    for name in params:
        np.testing.assert_allclose(result[name], expected[name], rtol=1e-4, atol=1e-5)
        assert np.abs(result[name] - other[name]).max() > 1e-2


@pytest.mark.parametrize("constant", [False, True])
def test_a_first_moment_in_bfloat16_is_updated_in_float32_and_rounded_when_it_is_stored(optimizer_config, constant):
    optimizer_config.first_moment_dtype = "bfloat16"
    random = np.random.default_rng(0)
    params = {"kernel": random.normal(size=(3, 4))}
    gradients = [{"kernel": np.ones((3, 4)) if constant else random.normal(size=(3, 4))} for _ in range(STEPS)]
    optimizer = make_optimizer(optimizer_config, STEPS)
    result = jax.tree.map(jnp.float32, params)
    state = optimizer.init(result)
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(jax.tree.map(jnp.float32, gradient), state, result)
        result = optax.apply_updates(result, updates)
    rounded = adamw_in_numpy(
        optimizer_config, params, gradients, stored=lambda mean: np.float64(jnp.bfloat16(jnp.float32(mean)))
    )
    exact = adamw_in_numpy(optimizer_config, params, gradients)
    np.testing.assert_allclose(result["kernel"], rounded["kernel"], rtol=1e-4, atol=1e-5)
    assert 1e-4 < np.abs(rounded["kernel"] - exact["kernel"]).max() < 1e-2


def test_the_first_moment_may_be_kept_in_bfloat16_and_the_second_is_not(optimizer_config):
    optimizer_config.first_moment_dtype = "bfloat16"
    params = {"layer": {"kernel": jnp.ones((2, 3))}}
    optimizer = make_optimizer(optimizer_config, STEPS)
    state = optimizer.init(params)
    updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    adam = adam_state(state)
    assert adam.mu["layer"]["kernel"].dtype == jnp.bfloat16
    assert adam.nu["layer"]["kernel"].dtype == updates["layer"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize(("warmup", "steps"), [(3, 10), (0, 5), (2000, 6)])
def test_the_logged_learning_rates_are_those_of_the_updates(warmup, steps):
    config = default_config("ViT-B/32").optimizer
    config.update(warmup_steps=warmup, weight_decay=0.0, beta1=0.0, beta2=0.0, epsilon=1e-30)
    optimizer, params = make_optimizer(config, steps), {"kernel": jnp.zeros(())}
    state, rates = optimizer.init(params), learning_rates(config, steps)
    assert rates.shape == (steps,) and rates.dtype == np.float32
    for rate in rates:  # without momentum, Adam's update is the rate in the gradient's direction
        updates, state = optimizer.update({"kernel": jnp.float32(3)}, state, params)
        np.testing.assert_allclose(updates["kernel"], -rate, rtol=1e-6)
