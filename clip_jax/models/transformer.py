"""The transformer that both towers are made of: pre-norm residual attention blocks, as in GPT-2 and CLIP.

Exact to OpenAI's: QuickGELU, LayerNorm with epsilon 1e-5 in float32, fused query-key-value projection. Layers are
scanned, so that compile time does not grow with depth; their parameters carry a leading ``layers`` axis.
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
    Parts,
    QueryKeyValue,
    attention,
    fused_attention,
)
from clip_jax.models.execution import Execution
from clip_jax.models.layers import Initializer, LayerNorm, Linear, shard_batch, torch_linear_init

# What the backward pass finds saved: nothing but a layer's input; what attention gave and the norms' few numbers; or
# also the products that cost most to compute again.
_FROM_ATTENTION = ("attended", "softmax_log_sum", "attention_output", "norm_statistics")
_SAVED = {
    "full": None,
    "attention": jax.checkpoint_policies.save_only_these_names(*_FROM_ATTENTION),
    "lite": jax.checkpoint_policies.save_only_these_names(*_FROM_ATTENTION, "qkv", "fc1"),
}


def remat_policy(execution: Execution) -> Callable[..., bool] | None:
    """What of a layer is saved.

    Of fused attention what its primitive returns: there are no names inside, and it would be computed twice.
    """
    policy = _SAVED[execution.remat]
    if policy is None or not execution.fused_attention:
        return policy
    return jax.checkpoint_policies.save_from_both_policies(
        policy, lambda primitive, *_, **__: primitive.name == FUSED_FORWARD
    )


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), the approximation of GELU that every published CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x) (arXiv 1606.08415), exact: PyTorch's default, which most of open_clip's own models have."""
    return nn.gelu(x, approximate=False)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


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


class ResidualAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), for each part ``[B, L, W]``.

    Several parts are the same function as one sequence of them; see :func:`attention`, also for ``visible``. With
    ``fused_attention`` there is one part of even length, and ``visible`` is what :func:`fused_attention` takes. With
    ``reading`` ``[B, 1, W]``, one position of each sequence, that position alone is computed: it attends to all.
    """

    num_heads: int
    mlp_width: int
    activation: str
    initializers: BlockInitializers
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, parts: Parts, visible: jax.Array | AttentionMask | None = None, reading: jax.Array | None = None
    ) -> Parts:
        width, init, zeros = parts[0].shape[-1], self.initializers, nn.initializers.zeros
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

        normed = [ln_1(x) for x in parts]
        if reading is None:
            queries, keys, values = zip(*(qkv(x, self.num_heads) for x in normed), strict=True)
        else:
            parts, queries = (reading,), qkv(ln_1(reading), self.num_heads, (0,))
            keys, values = zip(*(qkv(x, self.num_heads, (1, 2)) for x in normed), strict=True)
        if execution.fused_attention:
            attended = (fused_attention(*queries, *keys, *values, visible),)
        else:
            attended = attention(queries, keys, values, visible)
        parts = tuple(x + attention_output(y) for x, y in zip(parts, attended, strict=True))
        parts = tuple(x + fc2(activation(checkpoint_name(fc1(ln_2(x)), "fc1"))) for x in parts)
        return tuple(shard_batch(x, execution) for x in parts)


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
    """``num_layers`` blocks, of which a tower reads one position: each part ``[B, L, W]`` to ``[B, W]``.

    The last block computes no other position than that. Layers are scanned, unless ``execution.scan_layers`` is False.
    """

    num_layers: int
    num_heads: int
    mlp_width: int
    activation: str
    initializers: BlockInitializers
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, parts: Parts, read: Callable[[Parts], jax.Array], causal_end: jax.Array | None = None
    ) -> jax.Array:
        """Applies all blocks.

        Args:
          parts: sequences that attend to one another; one alone with ``causal_end``.
          read: takes the position that is read out of parts, ``[B, 1, W]``.
          causal_end: int32 ``[B]``, which position that is, where each sees only itself and those before it.
        """
        visible = visible_to_read = None
        if self.execution.fused_attention:
            parts, visible, visible_to_read = pad_to_even_length(*parts, causal_end, self.execution)
        elif causal_end is not None:
            position = jnp.arange(parts[0].shape[1])
            visible = position[:, None] <= position  # [K, Q]
            visible_to_read = (position <= causal_end[:, None])[:, None, :, None]  # [B, 1, K, 1]
        fields = {
            "num_heads": self.num_heads,
            "mlp_width": self.mlp_width,
            "activation": self.activation,
            "initializers": self.initializers,
            "execution": self.execution,
        }
        if not self.execution.scan_layers:
            for layer in range(self.num_layers - 1):
                parts = ResidualAttentionBlock(**fields, name=f"block_{layer}")(parts, visible)
            last = ResidualAttentionBlock(**fields, name=f"block_{self.num_layers - 1}")
            return last(parts, visible_to_read, read(parts))[0][:, 0]
        if self.is_initializing():
            layers = nn.scan(
                lambda block, parts, _: (block(parts, visible), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            parts, _ = layers(ResidualAttentionBlock(**fields, name="blocks"), parts, None)
            return read(parts)[:, 0]

        block, stacked = ResidualAttentionBlock(**fields, parent=None), self.variables["params"]["blocks"]

        def layer(parts: Parts, parameters: dict) -> tuple[Parts, None]:
            return block.apply({"params": parameters}, parts, visible), None

        unroll = max(1, min(self.execution.scan_unroll, self.num_layers - 1))
        if self.execution.remat != "none":
            # The compiler cannot see that a scan's step is computed twice; of several layers in one it could, and would
            # keep what is to be computed again.
            policy = remat_policy(self.execution)
            layer = jax.checkpoint(layer, prevent_cse=unroll > 1, policy=policy)
        before, last = (jax.tree.map(operator.itemgetter(part), stacked) for part in (slice(-1), -1))
        parts, _ = jax.lax.scan(layer, parts, before, unroll=unroll)
        return block.apply({"params": last}, parts, visible_to_read, read(parts))[0][:, 0]


def pad_to_even_length(
    x: jax.Array, causal_end: jax.Array | None, execution: Execution
) -> tuple[Parts, AttentionMask, AttentionMask]:
    """One part ``[B, L, W]``, with one more position if L is odd, and masks for all positions and for the one read.

    No position of ``x`` sees the one that is added.
    """
    batch, length, _ = x.shape
    if length % 2:
        x = jnp.pad(x, [(0, 0), (0, 1), (0, 0)])
    if causal_end is not None:
        return (x,), AttentionMask(causal=True), AttentionMask(num_keys=causal_end + 1)
    if not length % 2:
        return (x,), AttentionMask(), AttentionMask()
    # Split as the batch is: cuDNN takes each device's part of both.
    num_keys, num_queries = (shard_batch(jnp.full((batch,), n, jnp.int32), execution) for n in (length, length + 1))
    mask = AttentionMask(num_keys=num_keys, num_queries=num_queries, padded_from=length)
    return (x,), mask, AttentionMask(num_keys=num_keys)
