"""Layers that both towers use: linear layers, LayerNorm, and matrix products."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from clip_jax.models.execution import Execution

Initializer = Callable[..., jax.Array]


def shard_batch(x: jax.Array, execution: Execution) -> jax.Array:
    """Keeps the first axis split over the devices; does nothing without a ``batch_sharding``.

    It is applied to every activation. Parameters are split as well; without the constraint the compiler would send the
    activations of the whole batch to each share of a parameter, instead of gathering the parameter. With
    ``execution.row_major`` it also keeps the features of a position contiguous in memory.
    """
    sharding = execution.batch_sharding
    if sharding is None:
        return x
    x = jax.lax.with_sharding_constraint(x, sharding)
    if not execution.row_major:
        return x
    # On each device's share: for a split array the compiler would gather all of it.
    return jax.shard_map(row_major, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec)(x)


def row_major(x: jax.Array) -> jax.Array:
    """Constrains ``x`` and its gradient to a row-major memory layout.

    A product accepts any layout of its operands, and XLA propagates the layout that it chooses to everything they are
    computed from. On GPUs it chose the batch as the minor axis in the last layer, and therefore in the whole tower, and
    transposed before the other products (``python -m benchmarks.gpu_program --forms``).
    """
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def torch_linear_init(fan_in: int) -> Initializer:
    """Returns PyTorch's default for the kernel and the bias of a linear layer: uniform in ±1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """LayerNorm over the last axis, epsilon 1e-5: float32 ``[..., W]`` to the same.

    The gradient is written by hand. It saves the input and two numbers per row, and is faster on CPU than automatic
    differentiation (``benchmarks/cpu_gradients.py``).
    """
    return _layer_norm_forward(x, scale, bias)[0]


def _layer_norm_forward(x, scale, bias):
    mean = checkpoint_name(x.mean(axis=-1), "norm_statistics")
    variance = jnp.square(x - mean[..., None]).mean(axis=-1)
    rsqrt = checkpoint_name(jax.lax.rsqrt(variance + 1e-5), "norm_statistics")
    return (x - mean[..., None]) * rsqrt[..., None] * scale + bias, (x, mean, rsqrt, scale)


def _layer_norm_backward(saved, gradient):
    x, mean, rsqrt, scale = saved
    mean, rsqrt = mean[..., None], rsqrt[..., None]
    normed, scaled = (x - mean) * rsqrt, gradient * scale
    along_mean = scaled.mean(axis=-1, keepdims=True)
    along_normed = (scaled * normed).mean(axis=-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    return rsqrt * (scaled - along_mean - normed * along_normed), (gradient * normed).sum(rows), gradient.sum(rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
    """:func:`layer_norm` with its parameters, computed in float32, returned in the execution's dtype."""

    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (x.shape[-1],))
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)), (x.shape[-1],))
        return layer_norm(x.astype(jnp.float32), scale, bias).astype(self.execution.dtype)


class Linear(nn.Module):
    """x @ kernel + bias over the last axis; ``axes`` are the logical axes of the kernel ``[in, out]``.

    There is no bias if ``bias_init`` is None.
    """

    features: int
    axes: tuple[str, str]
    kernel_init: Initializer
    bias_init: Initializer | None = None
    execution: Execution = Execution()

    def parameters(self, in_features: int) -> tuple[jax.Array, jax.Array | float]:
        """Returns the kernel and the bias in the execution's dtype; a layer without bias has 0."""
        dtype = self.execution.dtype
        kernel_init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", kernel_init, (in_features, self.features)).astype(dtype)
        if self.bias_init is None:
            return kernel, 0.0
        bias_init = nn.with_logical_partitioning(self.bias_init, self.axes[1:])
        return kernel, self.param("bias", bias_init, (self.features,)).astype(dtype)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = self.parameters(x.shape[-1])
        return shard_batch(matrix_product(x, kernel, self.execution) + bias, self.execution)


def matrix_product(x: jax.Array, kernel: jax.Array, execution: Execution) -> jax.Array:
    """Returns ``[..., in]`` times ``[in, out]``; see ``Execution.merge_leading_axes``."""
    if not execution.merge_leading_axes:
        return jnp.matmul(x, kernel)
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])
