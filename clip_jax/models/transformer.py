"""The transformer of both towers: pre-norm residual attention blocks, as in GPT-2 and CLIP.

It is exactly OpenAI's: QuickGELU, LayerNorm with epsilon 1e-5 in float32, fused query-key-value projection. Layers are
scanned, so that compile time does not grow with depth; their parameters have a leading ``layers`` axis.
"""

import dataclasses
import operator
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from clip_jax.models.attention import (
    FUSED_FORWARD,
    AttentionMask,
    AttentionOutput,
    QueryKeyValue,
    Segments,
    attention,
    fused_attention,
)
from clip_jax.models.execution import Execution
from clip_jax.models.layers import Initializer, LayerNorm, Linear, shard_batch, torch_linear_init

# Activations of a layer that are saved for the backward pass, by ``Execution.remat``. "full" saves only the input;
# "attention" adds attention's results and the norms' statistics; "lite" adds the most expensive products.
_ATTENTION_NAMES = ("attended", "softmax_log_sum", "attention_output", "norm_statistics")
_SAVED = {
    "full": None,
    "attention": jax.checkpoint_policies.save_only_these_names(*_ATTENTION_NAMES),
    "lite": jax.checkpoint_policies.save_only_these_names(*_ATTENTION_NAMES, "qkv", "fc1"),
}


def remat_policy(execution: Execution) -> Callable[..., bool] | None:
    """Returns which activations of a layer are saved for the backward pass; None: only its input.

    Fused attention has no named activations, so the results of its primitive are saved. It would run twice otherwise.
    """
    policy = _SAVED[execution.remat]
    if policy is None or not execution.fused_attention:
        return policy
    return jax.checkpoint_policies.save_from_both_policies(
        policy, lambda primitive, *_, **__: primitive.name == FUSED_FORWARD
    )


def quick_gelu(x: jax.Array) -> jax.Array:
    """Returns x * sigmoid(1.702 x), the approximation of GELU in every CLIP that OpenAI published."""
    return x * nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """Returns x * Phi(x) (arXiv 1606.08415), exact: PyTorch's default, in most of open_clip's own models."""
    return nn.gelu(x, approximate=False)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


@dataclasses.dataclass(frozen=True)
class BlockInitializers:
    """Initializers of a block's four kernels. Biases are as in PyTorch: zero for attention, uniform for the MLP."""

    qkv: Initializer
    attention_output: Initializer
    fc1: Initializer
    fc2: Initializer


def vision_initializers(width: int, mlp_width: int) -> BlockInitializers:
    """Returns PyTorch's defaults, which OpenAI kept: Xavier uniform for fused qkv, ±1/sqrt(fan_in) for the rest."""
    qkv_bound = (6 / (width + 3 * width)) ** 0.5
    return BlockInitializers(
        qkv=lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -qkv_bound, qkv_bound),
        attention_output=torch_linear_init(width),
        fc1=torch_linear_init(width),
        fc2=torch_linear_init(mlp_width),
    )


def text_initializers(width: int, num_layers: int) -> BlockInitializers:
    """Returns OpenAI's normal initialization of text blocks, residual branches scaled down by depth as in GPT-2."""
    residual = width**-0.5 * (2 * num_layers) ** -0.5
    return BlockInitializers(
        qkv=nn.initializers.normal(width**-0.5),
        attention_output=nn.initializers.normal(residual),
        fc1=nn.initializers.normal((2 * width) ** -0.5),
        fc2=nn.initializers.normal(residual),
    )


class ResidualAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), for each segment ``[B, L, W]``.

    Several segments give the same result as one sequence of them. With ``fused_attention`` there is one segment, of
    even length. ``mask`` is that of :func:`attention` or :func:`fused_attention`. With ``query_position``
    ``[B, 1, W]``, the block computes only this position of each sequence, which attends to the whole sequence.
    """

    num_heads: int
    mlp_width: int
    activation: str
    initializers: BlockInitializers
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, segments: Segments, mask: jax.Array | AttentionMask | None = None, query_position: jax.Array | None = None
    ) -> Segments:
        width, init, zeros = segments[0].shape[-1], self.initializers, nn.initializers.zeros
        execution = self.execution
        ln_1, ln_2 = LayerNorm(execution, name="ln_1"), LayerNorm(execution, name="ln_2")
        qkv = QueryKeyValue(3 * width, ("embed", "qkv"), init.qkv, zeros, execution, name="qkv")
        output_axes = ("heads", "embed")
        attention_output = AttentionOutput(
            width, output_axes, init.attention_output, zeros, execution, name="attention_output"
        )
        fc1_bias, fc2_bias = torch_linear_init(width), torch_linear_init(self.mlp_width)
        fc1 = Linear(self.mlp_width, ("embed", "mlp"), init.fc1, fc1_bias, execution, name="fc1")
        fc2 = Linear(width, ("mlp", "embed"), init.fc2, fc2_bias, execution, name="fc2")
        activation = _ACTIVATIONS[self.activation]

        normed = [ln_1(x) for x in segments]
        if query_position is None:
            queries, keys, values = zip(*(qkv(x, self.num_heads) for x in normed), strict=True)
        else:
            segments, queries = (query_position,), qkv(ln_1(query_position), self.num_heads, (0,))
            keys, values = zip(*(qkv(x, self.num_heads, (1, 2)) for x in normed), strict=True)
        if execution.fused_attention:
            attended = (fused_attention(*queries, *keys, *values, mask),)
        else:
            attended = attention(queries, keys, values, mask, execution.sums_by_product)
        segments = tuple(x + attention_output(y) for x, y in zip(segments, attended, strict=True))
        segments = tuple(x + fc2(activation(checkpoint_name(fc1(ln_2(x)), "fc1"))) for x in segments)
        return tuple(shard_batch(x, execution) for x in segments)


def unstack_layers(variables: dict) -> dict:
    """Converts variables of scanned layers to those of separate layers (``scan_layers=False``).

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
    """``num_layers`` blocks, and the features at one position: segments ``[B, L, W]`` to ``[B, W]``.

    The last block computes only that position. Layers are scanned, unless ``execution.scan_layers`` is False.
    """

    num_layers: int
    num_heads: int
    mlp_width: int
    activation: str
    initializers: BlockInitializers
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, segments: Segments, read: Callable[[Segments], jax.Array], causal_end: jax.Array | None = None
    ) -> jax.Array:
        """Applies all blocks.

        Args:
          segments: ``[B, L, W]`` each, which attend to one another; only one with ``causal_end``.
          read: returns the position to compute, ``[B, 1, W]``, of the segments.
          causal_end: int32 ``[B]``, the index of that position in causal attention; None: attention is not causal.
        """
        mask = query_mask = None
        if self.execution.fused_attention:
            segments, mask, query_mask = pad_to_even_length(*segments, causal_end, self.execution)
        elif causal_end is not None:
            position = jnp.arange(segments[0].shape[1])
            mask = position[:, None] <= position  # [K, Q]
            query_mask = (position <= causal_end[:, None])[:, None, :, None]  # [B, 1, K, 1]
        fields = {
            "num_heads": self.num_heads,
            "mlp_width": self.mlp_width,
            "activation": self.activation,
            "initializers": self.initializers,
            "execution": self.execution,
        }
        if not self.execution.scan_layers:
            for layer in range(self.num_layers - 1):
                segments = ResidualAttentionBlock(**fields, name=f"block_{layer}")(segments, mask)
            last = ResidualAttentionBlock(**fields, name=f"block_{self.num_layers - 1}")
            return last(segments, query_mask, read(segments))[0][:, 0]
        if self.is_initializing():
            layers = nn.scan(
                lambda block, segments, _: (block(segments, mask), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            segments, _ = layers(ResidualAttentionBlock(**fields, name="blocks"), segments, None)
            return read(segments)[:, 0]

        block, stacked = ResidualAttentionBlock(**fields, parent=None), self.variables["params"]["blocks"]

        def layer(segments: Segments, parameters: dict) -> tuple[Segments, None]:
            return block.apply({"params": parameters}, segments, mask), None

        unroll = max(1, min(self.execution.scan_unroll, self.num_layers - 1))
        if self.execution.remat != "none":
            # With several layers in a step of the scan, the compiler could merge the recomputation with the forward
            # pass, and would keep the activations. It cannot do so across steps.
            policy = remat_policy(self.execution)
            layer = jax.checkpoint(layer, prevent_cse=unroll > 1, policy=policy)
        before, last = (jax.tree.map(operator.itemgetter(index), stacked) for index in (slice(-1), -1))
        segments, _ = jax.lax.scan(layer, segments, before, unroll=unroll)
        return block.apply({"params": last}, segments, query_mask, read(segments))[0][:, 0]


def pad_to_even_length(
    x: jax.Array, causal_end: jax.Array | None, execution: Execution
) -> tuple[Segments, AttentionMask, AttentionMask]:
    """Pads one segment ``[B, L, W]`` to an even length, and returns it with two masks.

    The first mask is for all queries, the second for the one position that the last block computes. No position of
    ``x`` attends to the padding.
    """
    batch, length, _ = x.shape
    if length % 2:
        x = jnp.pad(x, [(0, 0), (0, 1), (0, 0)])
    if causal_end is not None:
        return (x,), AttentionMask(causal=True), AttentionMask(num_keys=causal_end + 1)
    if not length % 2:
        return (x,), AttentionMask(), AttentionMask()
    # Split like the batch: cuDNN takes each device's part of both.
    num_keys, num_queries = (shard_batch(jnp.full((batch,), n, jnp.int32), execution) for n in (length, length + 1))
    mask = AttentionMask(num_keys=num_keys, num_queries=num_queries, padded_from=length)
    return (x,), mask, AttentionMask(num_keys=num_keys)
