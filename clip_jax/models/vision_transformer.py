"""The image tower: a Vision Transformer as CLIP has it (section 2.4 of the paper)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models.layers import LayerNorm, Linear, shard_batch, torch_linear_init
from clip_jax.models.positions import resize_positions
from clip_jax.models.transformer import Transformer, vision_initializers


def split_into_patches(images: jax.Array, patch_size: int) -> jax.Array:
    """Cuts ``[B, H, W, 3]`` into ``[B, (H / P) * (W / P), P * P * 3]``, row by row, a pixel's channels together."""
    batch, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch, rows, patch_size, columns, patch_size, channels).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(batch, rows * columns, patch_size * patch_size * channels)


def num_kept_patches(num_patches: int, patch_dropout: float) -> int:
    """How many patches of an image are kept: the share ``1 - patch_dropout``, rounded down, but at least one."""
    return max(1, int(num_patches * (1 - patch_dropout) + 1e-6))  # 1 - 0.9 is a little less than 0.1


def choose_patches(seeds: jax.Array, num_patches: int, patch_dropout: float) -> jax.Array:
    """Draws which patches of each image are kept: int32 ``[B, K]``, in rising order, from its seed of uint32 ``[B]``.

    K is :func:`num_kept_patches` (FLIP, arXiv 2212.00794, section 3).
    """
    numbers = jax.vmap(lambda seed: jax.random.uniform(jax.random.key(seed), (num_patches,)))(seeds)
    order = jnp.argsort(numbers, axis=1)
    return jnp.sort(order[:, : num_kept_patches(num_patches, patch_dropout)], axis=1)


class VisionTransformer(nn.Module):
    """Patches, class token, positions, norm, blocks, norm of the class token, projection without bias.

    The patch embedding is a convolution whose stride is its kernel, written as the matrix product that it is.
    Maps normalised images ``[B, S, S, 3]`` to features ``[B, embed_dim]`` in ``dtype``, not yet of unit length. Where
    S is not ``image_size``, the positions are resized. ``kept_patches`` int32 ``[B, K]`` leaves out all other patches.
    ``train`` changes nothing here: it is there because a ResNet needs it.
    """

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    activation: str
    mlp_ratio: float
    embed_dim: int
    remat: str = "none"
    scan_layers: bool = True
    scan_unroll: int = 1
    class_token_apart: bool = False
    fused_attention: bool = False
    dtype: jnp.dtype = jnp.float32
    batch_sharding: jax.sharding.Sharding | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, kept_patches: jax.Array | None = None) -> jax.Array:
        normal = nn.initializers.normal(self.width**-0.5)
        patches = split_into_patches(images.astype(self.dtype), self.patch_size)  # [B, N, P * P * 3]
        if kept_patches is not None:
            patches = jnp.take_along_axis(patches, kept_patches[:, :, None], axis=1)  # [B, K, P * P * 3]
        patch_init = torch_linear_init(patches.shape[-1])
        linear = functools.partial(Linear, dtype=self.dtype, batch_sharding=self.batch_sharding)
        x = linear(self.width, ("patch", "embed"), patch_init, name="patch_embedding")(patches)

        class_embedding = self.param("class_embedding", nn.with_logical_partitioning(normal, ("embed",)), (self.width,))
        class_token = jnp.broadcast_to(class_embedding.astype(self.dtype), (x.shape[0], 1, self.width))
        positions = self.param(
            "positional_embedding",
            nn.with_logical_partitioning(normal, ("position", "embed")),
            ((self.image_size // self.patch_size) ** 2 + 1, self.width),
        )
        positions = resize_positions(positions, images.shape[1] // self.patch_size).astype(self.dtype)
        places = positions[1:]  # [N, W]
        if kept_patches is not None:
            # A product, whose gradient is a product too: taking rows would have one that scatters, slow on a TPU.
            chosen = jax.nn.one_hot(kept_patches, len(places), dtype=self.dtype)
            places = jnp.einsum("bkn,nw->bkw", chosen, places, precision=jax.lax.Precision.HIGHEST)
        parts = (class_token + positions[:1], x + places)  # [B, 1, W], [B, N or K, W]
        if not self.class_token_apart:
            parts = (jnp.concatenate(parts, axis=1),)
        ln_pre = LayerNorm(self.dtype, name="ln_pre")
        parts = tuple(shard_batch(ln_pre(shard_batch(x, self.batch_sharding)), self.batch_sharding) for x in parts)
        mlp_width = round(self.width * self.mlp_ratio)
        x = Transformer(
            self.num_layers,
            self.num_heads,
            mlp_width,
            self.activation,
            vision_initializers(self.width, mlp_width),
            remat=self.remat,
            scan_layers=self.scan_layers,
            scan_unroll=self.scan_unroll,
            fused_attention=self.fused_attention,
            dtype=self.dtype,
            batch_sharding=self.batch_sharding,
            name="transformer",
        )(parts, read=lambda parts: parts[0][:, :1])  # [B, W], of the class token
        x = LayerNorm(self.dtype, name="ln_post")(x)
        return linear(self.embed_dim, ("embed", "output"), normal, name="projection")(x)
