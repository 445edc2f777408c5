"""The text tower: a GPT-2 style transformer whose feature is the one at the end-of-text token (section 2.4)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models.layers import LayerNorm, Linear, shard_batch
from clip_jax.models.transformer import Transformer, text_initializers


class TextTransformer(nn.Module):
    """Maps tokens int32 ``[B, L]`` to features ``[B, embed_dim]`` in ``dtype``, not yet of unit length.

    Attention is causal and padding isn't masked: what stands behind the end-of-text token cannot reach it.
    That token has the highest id of the vocabulary, so its position is the arg max over the ids.
    """

    context_length: int
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    activation: str
    mlp_ratio: float
    embed_dim: int
    remat: str = "none"
    scan_layers: bool = True
    scan_unroll: int = 1
    fused_attention: bool = False
    dtype: jnp.dtype = jnp.float32
    batch_sharding: jax.sharding.Sharding | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        normal, partitioned = nn.initializers.normal, nn.with_logical_partitioning
        token_embedding = self.param(
            "token_embedding", partitioned(normal(0.02), ("vocab", "embed")), (self.vocab_size, self.width)
        )
        positions = self.param(
            "positional_embedding", partitioned(normal(0.01), ("position", "embed")), (self.context_length, self.width)
        )
        x = token_embedding.astype(self.dtype)[tokens] + positions[: tokens.shape[1]].astype(self.dtype)
        x = shard_batch(x, self.batch_sharding)  # [B, L, W]
        ends = tokens.argmax(axis=-1)  # [B]
        x = Transformer(
            self.num_layers,
            self.num_heads,
            round(self.width * self.mlp_ratio),
            self.activation,
            text_initializers(self.width, self.num_layers),
            remat=self.remat,
            scan_layers=self.scan_layers,
            scan_unroll=self.scan_unroll,
            fused_attention=self.fused_attention,
            dtype=self.dtype,
            batch_sharding=self.batch_sharding,
            name="transformer",
        )((x,), read=lambda parts: jnp.take_along_axis(parts[0], ends[:, None, None], axis=1), causal_end=ends)
        x = LayerNorm(self.dtype, name="ln_final")(x)
        project = Linear(
            self.embed_dim,
            ("embed", "output"),
            normal(self.width**-0.5),
            dtype=self.dtype,
            batch_sharding=self.batch_sharding,
            name="projection",
        )
        return project(x)
