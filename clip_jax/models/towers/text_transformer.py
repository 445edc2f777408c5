"""The text tower: a GPT-2 style transformer; the end-of-text token gives the features (CLIP paper, section 2.4)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models.execution import Execution
from clip_jax.models.layers import LayerNorm, Linear, shard_batch
from clip_jax.models.towers.base import Shapes, TextTower
from clip_jax.models.towers.transformer_tower import TransformerTower, transformer_fields
from clip_jax.models.transformer import text_initializers


@dataclasses.dataclass(frozen=True)
class TextTransformerPreset(TransformerTower, TextTower):
    """A text tower over ``context_length`` byte-pair tokens."""

    name = "text_transformer"

    width: int
    num_layers: int
    num_heads: int
    context_length: int = 77
    vocab_size: int = 49_408
    activation: str = "quick_gelu"
    mlp_ratio: float = 4.0

    def build(self, embed_dim: int, execution: Execution) -> nn.Module:
        return TextTransformer(self, embed_dim, execution)

    def problems(self, prefix: str) -> list[str]:
        problems = super().problems(prefix)
        if self.context_length < 2:
            problems.append(f"{prefix}.context_length must hold the two markers at least")
        return problems

    def flops(self, embed_dim: int) -> int:
        return 3 * (self.layer_flops(self.context_length) + 2 * self.width * embed_dim)

    @classmethod
    def from_shapes(cls, shapes: Shapes, activation: str) -> "TextTransformerPreset":
        vocab_size, _ = shapes.shape("token_embedding")
        context_length, _ = shapes.shape("positional_embedding")
        sizes = {"context_length": context_length, "vocab_size": vocab_size}
        return cls(activation=activation, **sizes, **transformer_fields(shapes, cls.section, {}))


class TextTransformer(nn.Module):
    """Maps tokens int32 ``[B, L]`` to features ``[B, embed_dim]`` in ``execution.dtype``, not of unit length.

    Attention is causal and padding isn't masked: the end-of-text token does not attend to tokens after it.
    That token has the highest id of the vocabulary, so its index is the arg max over the ids.
    """

    preset: TextTransformerPreset
    embed_dim: int
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        preset, execution = self.preset, self.execution
        normal, partitioned = nn.initializers.normal, nn.with_logical_partitioning
        token_embedding = self.param(
            "token_embedding", partitioned(normal(0.02), ("vocab", "embed")), (preset.vocab_size, preset.width)
        )
        positions = self.param(
            "positional_embedding",
            partitioned(normal(0.01), ("position", "embed")),
            (preset.context_length, preset.width),
        )
        x = token_embedding.astype(execution.dtype)[tokens] + positions[: tokens.shape[1]].astype(execution.dtype)
        x = shard_batch(x, execution)  # [B, L, W]
        ends = tokens.argmax(axis=-1)  # [B]
        x = preset.transformer(text_initializers(preset.width, preset.num_layers), execution)(
            (x,), read=lambda segments: jnp.take_along_axis(segments[0], ends[:, None, None], axis=1), causal_end=ends
        )
        x = LayerNorm(execution, name="ln_final")(x)
        kernel_init = normal(preset.width**-0.5)
        return Linear(self.embed_dim, ("embed", "output"), kernel_init, execution=execution, name="projection")(x)
