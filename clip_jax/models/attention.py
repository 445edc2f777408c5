"""The transformer that both towers are made of: pre-norm residual attention blocks, as in GPT-2 and CLIP.

Exact to OpenAI's: QuickGELU, LayerNorm with epsilon 1e-5 in float32, fused query-key-value projection. Layers are
scanned, so that compile time does not grow with depth; their parameters carry a leading ``layers`` axis.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), the approximation of GELU that every published CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x), exact: PyTorch's default, which most of open_clip's own models were trained with."""
    return nn.gelu(x, approximate=False)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


def shard_batch(x: jax.Array, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Keeps the first axis split over the devices; without a sharding, as on one device, does nothing.

    Said of every activation: parameters are split as well, and left to itself the compiler prefers to move the
    activations of the whole batch to where a parameter's part is, instead of gathering that parameter.
    """
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def torch_linear_init(fan_in: int) -> Initializer:
    """PyTorch's default for the weights and the bias of a linear layer: uniform in ±1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclasses.dataclass(frozen=True)
class BlockInitializers:
    """How a block's four kernels start. Biases do as in PyTorch: zero for attention, uniform for the MLP."""

    qkv: Initializer
    attention_output: Initializer
    fc1: Initializer
    fc2: Initializer


def vision_initializers(width: int, mlp_width: int) -> BlockInitializers:
    """What OpenAI left at PyTorch's defaults: Xavier uniform for fused qkv, ±1/sqrt(fan_in) for the rest."""
    qkv_bound = (6 / (width + 3 * width)) ** 0.5
    return BlockInitializers(
        qkv=lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -qkv_bound, qkv_bound),
        attention_output=torch_linear_init(width),
        fc1=torch_linear_init(width),
        fc2=torch_linear_init(mlp_width),
    )


def text_initializers(width: int, num_layers: int) -> BlockInitializers:
    """OpenAI's normal initialisation of the text blocks, residual branches scaled down by depth as in GPT-2."""
    residual = width**-0.5 * (2 * num_layers) ** -0.5
    return BlockInitializers(
        qkv=nn.initializers.normal(width**-0.5),
        attention_output=nn.initializers.normal(residual),
        fc1=nn.initializers.normal((2 * width) ** -0.5),
        fc2=nn.initializers.normal(residual),
    )


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """LayerNorm over the last axis, epsilon 1e-5: float32 ``[..., W]`` to the same.

    The gradient is written out: it keeps the input and two numbers a row, and is faster than what automatic
    differentiation makes of it on CPU (``benchmarks/cpu_gradients.py``).
    """
    return _layer_norm_forward(x, scale, bias)[0]


def _layer_norm_forward(x, scale, bias):
    mean = x.mean(axis=-1, keepdims=True)
    rsqrt = jax.lax.rsqrt(jnp.square(x - mean).mean(axis=-1, keepdims=True) + 1e-5)
    return (x - mean) * rsqrt * scale + bias, (x, mean, rsqrt, scale)


def _layer_norm_backward(saved, gradient):
    x, mean, rsqrt, scale = saved
    normed, scaled = (x - mean) * rsqrt, gradient * scale
    along_mean = scaled.mean(axis=-1, keepdims=True)
    along_normed = (scaled * normed).mean(axis=-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    return rsqrt * (scaled - along_mean - normed * along_normed), (gradient * normed).sum(rows), gradient.sum(rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
    """:func:`layer_norm` with its parameters, computed in float32, returned in ``dtype``."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (x.shape[-1],))
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)), (x.shape[-1],))
        return layer_norm(x.astype(jnp.float32), scale, bias).astype(self.dtype)


class Linear(nn.Module):
    """x @ kernel + bias over the last axis, with the logical ``axes`` of the kernel ``[in, out]``.

    Without bias if ``bias_init`` is None.
    """

    features: int
    axes: tuple[str, str]
    kernel_init: Initializer
    bias_init: Initializer | None = None
    dtype: jnp.dtype = jnp.float32
    batch_sharding: jax.sharding.Sharding | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(self.kernel_init, self.axes), (x.shape[-1], self.features)
        )
        y = matrix_product(x, kernel.astype(self.dtype))
        if self.bias_init is not None:
            bias = self.param("bias", nn.with_logical_partitioning(self.bias_init, self.axes[1:]), (self.features,))
            y += bias.astype(self.dtype)
        return shard_batch(y, self.batch_sharding)


def matrix_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[..., in]`` times ``[in, out]``.

    On CPU the leading axes are merged: XLA's CPU kernels are slow at a gradient that contracts two axes
    (``benchmarks/cpu_gradients.py``). On TPU merging would copy wherever the length isn't a multiple of 8.
    """

    def merged(x, kernel):
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])

    return jax.lax.platform_dependent(x, kernel, cpu=merged, default=jnp.matmul)


def multi_head_attention(qkv: jax.Array, num_heads: int, causal: bool) -> jax.Array:
    """Softmax attention, probabilities in float32.

    Args:
      qkv: ``[B, L, 3 * W]``, queries, keys and values side by side.
      causal: whether a position sees only itself and those before it.

    Returns:
      ``[B, L, W]`` in the dtype of ``qkv``.
    """
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    query, key, value = jnp.moveaxis(qkv.reshape(batch, length, 3, num_heads, width // num_heads), 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * (width // num_heads) ** -0.5, key).astype(jnp.float32)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    probabilities = nn.softmax(scores).astype(qkv.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", probabilities, value).reshape(batch, length, width)


class ResidualAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): ``[B, L, W]`` to ``[B, L, W]``."""

    num_heads: int
    mlp_width: int
    activation: str
    causal: bool
    initializers: BlockInitializers
    dtype: jnp.dtype = jnp.float32
    batch_sharding: jax.sharding.Sharding | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        width, init, zeros = x.shape[-1], self.initializers, nn.initializers.zeros
        linear = functools.partial(Linear, dtype=self.dtype, batch_sharding=self.batch_sharding)
        y = LayerNorm(self.dtype, name="ln_1")(x)
        qkv = linear(3 * width, ("embed", "qkv"), init.qkv, zeros, name="qkv")(y)
        y = multi_head_attention(qkv, self.num_heads, self.causal)
        x = x + linear(width, ("heads", "embed"), init.attention_output, zeros, name="attention_output")(y)

        y = LayerNorm(self.dtype, name="ln_2")(x)
        y = linear(self.mlp_width, ("embed", "mlp"), init.fc1, torch_linear_init(width), name="fc1")(y)
        y = _ACTIVATIONS[self.activation](y)
        y = linear(width, ("mlp", "embed"), init.fc2, torch_linear_init(self.mlp_width), name="fc2")(y)
        return shard_batch(x + y, self.batch_sharding), None  # scan wants a carry and an output


def unstack_layers(variables: dict) -> dict:
    """The variables of scanned layers as those of layers that stand by themselves (``scan_layers=False``).

    Every ``blocks`` with leaves ``[num_layers, ...]`` becomes ``block_0``, ``block_1`` and so on.
    """
    unstacked = {}
    for name, value in variables.items():
        if name == "blocks":
            num_layers = len(jax.tree.leaves(value)[0])
            for layer in range(num_layers):
                unstacked[f"block_{layer}"] = jax.tree.map(lambda leaf, layer=layer: leaf[layer], value)
        else:
            unstacked[name] = unstack_layers(value) if isinstance(value, dict) else value
    return unstacked


class Transformer(nn.Module):
    """``num_layers`` blocks: ``[B, L, W]`` to ``[B, L, W]``.

    Scanned, unless ``scan_layers`` is False: see :class:`clip_jax.models.clip.CLIP`.
    """

    num_layers: int
    num_heads: int
    mlp_width: int
    activation: str
    initializers: BlockInitializers
    causal: bool = False
    remat: str = "none"
    scan_layers: bool = True
    scan_unroll: int = 1
    dtype: jnp.dtype = jnp.float32
    batch_sharding: jax.sharding.Sharding | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(ResidualAttentionBlock, prevent_cse=False) if self.remat == "full" else ResidualAttentionBlock
        fields = {
            "num_heads": self.num_heads,
            "mlp_width": self.mlp_width,
            "activation": self.activation,
            "causal": self.causal,
            "initializers": self.initializers,
            "dtype": self.dtype,
            "batch_sharding": self.batch_sharding,
        }
        if not self.scan_layers:
            for layer in range(self.num_layers):
                x, _ = block(**fields, name=f"block_{layer}")(x)
            return x
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.num_layers,
            unroll=min(self.scan_unroll, self.num_layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(**fields, name="blocks")(x)
        return x
