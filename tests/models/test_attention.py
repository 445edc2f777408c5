"""The parts of a block against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.attention import (
    LayerNorm,
    attention_among_parts,
    layer_norm,
    matrix_product,
    multi_head_attention,
    quick_gelu,
)


def test_quick_gelu_is_x_times_the_sigmoid_of_1_702_x():
    x = np.linspace(-8, 8, 101)
    np.testing.assert_allclose(quick_gelu(jnp.float32(x)), x / (1 + np.exp(-1.702 * x)), rtol=2e-5, atol=1e-7)
    assert abs(quick_gelu(jnp.float32(1.0)) - jax.nn.gelu(jnp.float32(1.0))) > 1e-3  # not the exact one


def plain_layer_norm(x, scale, bias, epsilon):
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + epsilon) * scale + bias


def layer_norm_case(shape, spread):
    random = np.random.default_rng(0)
    x = random.normal(0.5, 1, shape) * spread
    scale, bias = random.normal(1, 0.5, shape[-1]), random.normal(0, 1, shape[-1])
    return (x, scale, bias), random.normal(0, 1, shape)


# Where the spread is 1e-3 the variance is a tenth of epsilon, so that another epsilon is another function.
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
def test_layer_norm_and_its_written_gradient_are_those_of_the_plain_formula(shape, spread):
    arguments, cotangent = layer_norm_case(shape, spread)
    with jax.enable_x64(True):
        expected, backward = jax.vjp(lambda *a: plain_layer_norm(*a, 1e-5), *map(jnp.asarray, arguments))
        expected_gradients = backward(jnp.asarray(cotangent))
        assert expected.dtype == jnp.float64
    result, backward = jax.vjp(layer_norm, *(jnp.float32(a) for a in arguments))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    for gradient, reference in zip(backward(jnp.float32(cotangent)), expected_gradients, strict=True):
        assert gradient.shape == reference.shape
        np.testing.assert_allclose(gradient, reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max())


@pytest.mark.parametrize("epsilon", [1e-6, 1e-12])
def test_another_epsilon_is_another_function_where_a_row_hardly_varies(epsilon):
    arguments, _ = layer_norm_case((5, 16), 1e-3)
    result = layer_norm(*(jnp.float32(a) for a in arguments))
    other = plain_layer_norm(*(jnp.float32(a) for a in arguments), epsilon)
    assert np.abs(result - other).max() > 0.1


def test_attention_among_parts_is_that_of_one_sequence():
    random = np.random.default_rng(0)
    qkv = jnp.float32(random.normal(size=(3, 7, 3 * 8)))
    whole = multi_head_attention(qkv, num_heads=2, causal=False)

    def heads(part):  # [B, L, 3 * W] to three of [B, heads, D, L]
        return tuple(jnp.moveaxis(part.reshape(3, -1, 3, 2, 4), (2, 1), (0, 4)))

    parts = attention_among_parts([heads(qkv[:, :1]), heads(qkv[:, 1:3]), heads(qkv[:, 3:])])
    assert [part.shape[1] for part in parts] == [1, 2, 4]
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=0, atol=1e-6)


def test_attention_among_parts_of_very_different_scores_stays_finite():
    parts = [
        (jnp.full((1, 1, 2, 1), scale), jnp.full((1, 1, 2, 1), scale), jnp.ones((1, 1, 2, 1))) for scale in (1, 60)
    ]
    assert all(np.isfinite(part).all() for part in attention_among_parts(parts))


def test_layer_norm_of_a_row_without_variation_has_finite_gradients():
    gradients = jax.grad(lambda *a: layer_norm(*a).sum(), argnums=(0, 1, 2))(jnp.ones((2, 8)), jnp.ones(8), jnp.ones(8))
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_layer_norm_in_bfloat16_computes_in_float32():
    x = jnp.bfloat16(np.random.default_rng(0).normal(100, 1, (4, 64)))  # bfloat16 squares would lose the variance
    module = LayerNorm(jnp.bfloat16)
    params = module.init(jax.random.key(0), x)
    result = module.apply(params, x)
    assert result.dtype == jnp.bfloat16
    expected = plain_layer_norm(np.float64(x), 1.0, 0.0, 1e-5)
    np.testing.assert_allclose(np.float64(result), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 3, 2)])
def test_matrix_product_and_its_gradients_are_those_of_a_matrix_product(leading):
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(*leading, 4)), random.normal(size=(4, 6))
    cotangent = random.normal(size=(*leading, 6))
    result, backward = jax.vjp(matrix_product, jnp.float32(x), jnp.float32(kernel))
    of_x, of_kernel = backward(jnp.float32(cotangent))
    np.testing.assert_allclose(result, x @ kernel, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_x, cotangent @ kernel.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_kernel, x.reshape(-1, 4).T @ cotangent.reshape(-1, 6), rtol=1e-5, atol=1e-5)


def attention_by_loops(qkv, num_heads, causal):
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    size = width // num_heads
    result = np.zeros((batch, length, width))
    for b in range(batch):
        for head in range(num_heads):
            query, key, value = (qkv[b, :, start + head * size :][:, :size] for start in (0, width, 2 * width))
            for position in range(length):
                seen = slice(position + 1) if causal else slice(None)
                weights = np.exp(key[seen] @ query[position] / np.sqrt(size))
                columns = slice(head * size, (head + 1) * size)
                result[b, position, columns] = weights @ value[seen] / weights.sum()
    return result


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_that_of_the_formula_head_by_head(causal):
    qkv = np.random.default_rng(0).normal(size=(2, 5, 3 * 12))
    result = multi_head_attention(jnp.float32(qkv), 3, causal)
    np.testing.assert_allclose(result, attention_by_loops(qkv, 3, causal), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_only_causal_attention_keeps_later_positions_from_earlier_ones(causal):
    qkv = np.random.default_rng(0).normal(size=(1, 6, 3 * 8))
    changed = qkv.copy()
    changed[:, 4:] += 1
    before, after = (multi_head_attention(jnp.float32(x), 2, causal) for x in (qkv, changed))
    assert (np.abs(before - after)[:, :4].max() == 0) == causal
    assert np.abs(before - after)[:, 4:].max() > 1e-3
