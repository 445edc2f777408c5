"""The transformer that both towers are made of: pre-norm residual attention blocks, as in GPT-2 and CLIP.

Exact to OpenAI's: QuickGELU, LayerNorm with epsilon 1e-5 in float32, fused query-key-value projection. Layers are
scanned, so that compile time does not grow with depth; their parameters carry a leading ``layers`` axis.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Initializer = Callable[..., jax.Array]
Parts = tuple[jax.Array, ...]  # sequences [B, L, W] that attend to one another as if they were one


# What the backward pass finds saved: nothing but a layer's input, or also what costs most to compute again.
REMAT_POLICIES = {
    "full": None,
    "lite": jax.checkpoint_policies.save_only_these_names("qkv", "attention_output", "fc1"),
}


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), the approximation of GELU that every published CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x) (arXiv 1606.08415), exact: PyTorch's default, which most of open_clip's own models have."""
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


class QueryKeyValue(nn.Module):
    """The fused projection of a block: kernel ``[W, 3 * W]``, bias ``[3 * W]``."""

    kernel_init: Initializer
    dtype: jnp.dtype = jnp.float32
    batch_sharding: jax.sharding.Sharding | None = None

    @nn.compact
    def __call__(self, x: jax.Array, heads_first: int = 0) -> jax.Array | Parts:
        """``[B, L, W]`` to ``[B, L, 3 * W]``, or with ``heads_first`` heads to three of ``[B, heads, D, L]``."""
        width = x.shape[-1]
        kernel_init = nn.with_logical_partitioning(self.kernel_init, ("embed", "qkv"))
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("qkv",))
        kernel = self.param("kernel", kernel_init, (width, 3 * width)).astype(self.dtype)
        bias = self.param("bias", bias_init, (3 * width,)).astype(self.dtype)
        if not heads_first or x.shape[1] == 1:
            qkv = shard_batch(matrix_product(x, kernel) + bias, self.batch_sharding)
            qkv = checkpoint_name(qkv, "qkv")
            if not heads_first:
                return qkv
            return tuple(jnp.moveaxis(qkv.reshape(x.shape[0], 3, heads_first, -1, 1), 1, 0))
        kernel, bias = (array.reshape(*array.shape[:-1], 3, heads_first, -1) for array in (kernel, bias))
        projected = (jnp.einsum("blw,whd->bhdl", x, kernel[:, i]) + bias[i, :, :, None] for i in range(3))
        return tuple(checkpoint_name(shard_batch(y, self.batch_sharding), "qkv") for y in projected)


def attention_among_parts(heads: Sequence[Parts]) -> Parts:
    """Softmax attention among all positions of several parts, as if they stood in one sequence.

    For a TPU, which pads the last two axes of every array to multiples of 8 and 128: 256 patches and a class token in
    one sequence make a product of scores as large as one of 384. Here each pair of parts has a product of its own, and
    the softmax over them shares one maximum and one denominator, by which the mixed values are divided.

    Args:
      heads: each part's queries, keys and values, ``[B, heads, D, L]``.

    Returns:
      Each part's ``[B, L, heads * D]`` in its dtype; scores and exponentials are float32.
    """
    results = []
    for query, _, _ in heads:
        batch, num_heads, head_width, length = query.shape
        query *= head_width**-0.5
        scores = [jnp.einsum("bhdq,bhdk->bhqk", query, key).astype(jnp.float32) for _, key, _ in heads]
        highest = functools.reduce(jnp.maximum, (part.max(axis=-1, keepdims=True) for part in scores))
        exponentials = [jnp.exp(part - jax.lax.stop_gradient(highest)) for part in scores]
        total = functools.reduce(jnp.add, (part.sum(axis=-1, keepdims=True) for part in exponentials))
        mixed = functools.reduce(
            jnp.add,
            (
                jnp.einsum("bhqk,bhdk->bqhd", part.astype(query.dtype), value)
                for part, (_, _, value) in zip(exponentials, heads, strict=True)
            ),
        )
        mixed = mixed / jnp.swapaxes(total, 1, 2).astype(mixed.dtype)  # total: [B, heads, L, 1]
        results.append(mixed.reshape(batch, length, num_heads * head_width))
    return tuple(results)


class ResidualAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), for each part ``[B, L, W]``.

    Several parts are the same function as one sequence of them; see :func:`attention_among_parts`.
    """

    num_heads: int
    mlp_width: int
    activation: str
    causal: bool
    initializers: BlockInitializers
    dtype: jnp.dtype = jnp.float32
    batch_sharding: jax.sharding.Sharding | None = None

    @nn.compact
    def __call__(self, parts: Parts) -> tuple[Parts, None]:
        width, init, zeros = parts[0].shape[-1], self.initializers, nn.initializers.zeros
        shared = {"dtype": self.dtype, "batch_sharding": self.batch_sharding}
        linear = functools.partial(Linear, **shared)
        ln_1, ln_2 = LayerNorm(self.dtype, name="ln_1"), LayerNorm(self.dtype, name="ln_2")
        qkv = QueryKeyValue(init.qkv, **shared, name="qkv")
        attention_output = linear(width, ("heads", "embed"), init.attention_output, zeros, name="attention_output")
        fc1 = linear(self.mlp_width, ("embed", "mlp"), init.fc1, torch_linear_init(width), name="fc1")
        fc2 = linear(width, ("mlp", "embed"), init.fc2, torch_linear_init(self.mlp_width), name="fc2")

        if len(parts) == 1:
            attended = (multi_head_attention(qkv(ln_1(parts[0])), self.num_heads, self.causal),)
        else:
            attended = attention_among_parts([qkv(ln_1(x), self.num_heads) for x in parts])
        parts = tuple(
            x + checkpoint_name(attention_output(y), "attention_output") for x, y in zip(parts, attended, strict=True)
        )
        activation = _ACTIVATIONS[self.activation]
        parts = tuple(x + fc2(activation(checkpoint_name(fc1(ln_2(x)), "fc1"))) for x in parts)
        return tuple(shard_batch(x, self.batch_sharding) for x in parts), None  # scan wants a carry and an output


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
    """``num_layers`` blocks, for each part ``[B, L, W]``.

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
    def __call__(self, parts: Parts) -> Parts:
        block = ResidualAttentionBlock
        if self.remat != "none":
            block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
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
                parts, _ = block(**fields, name=f"block_{layer}")(parts)
            return parts
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.num_layers,
            unroll=min(self.scan_unroll, self.num_layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        parts, _ = layers(**fields, name="blocks")(parts)
        return parts
