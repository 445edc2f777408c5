"""LayerNorm and matrix products with their written gradients, against the plain formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.execution import Execution
from clip_jax.models.layers import LayerNorm, layer_norm, matrix_product


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


def test_layer_norm_of_a_row_without_variation_has_finite_gradients():
    gradients = jax.grad(lambda *a: layer_norm(*a).sum(), argnums=(0, 1, 2))(jnp.ones((2, 8)), jnp.ones(8), jnp.ones(8))
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_layer_norm_in_bfloat16_computes_in_float32():
    x = jnp.bfloat16(np.random.default_rng(0).normal(100, 1, (4, 64)))  # bfloat16 squares would lose the variance
    module = LayerNorm(Execution(dtype=jnp.bfloat16))
    params = module.init(jax.random.key(0), x)
    result = module.apply(params, x)
    assert result.dtype == jnp.bfloat16
    expected = plain_layer_norm(np.float64(x), 1.0, 0.0, 1e-5)
    np.testing.assert_allclose(np.float64(result), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("merge_leading_axes", [True, False])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 3, 2)])
def test_matrix_product_and_its_gradients_are_those_of_a_matrix_product(leading, merge_leading_axes):
    execution = Execution(merge_leading_axes=merge_leading_axes)
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(*leading, 4)), random.normal(size=(4, 6))
    cotangent = random.normal(size=(*leading, 6))
    result, backward = jax.vjp(lambda *a: matrix_product(*a, execution), jnp.float32(x), jnp.float32(kernel))
    of_x, of_kernel = backward(jnp.float32(cotangent))
    np.testing.assert_allclose(result, x @ kernel, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_x, cotangent @ kernel.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_kernel, x.reshape(-1, 4).T @ cotangent.reshape(-1, 6), rtol=1e-5, atol=1e-5)
