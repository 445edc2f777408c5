"""The image tower: a Vision Transformer as CLIP has it (section 2.4 of the CLIP paper)."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models.execution import Execution
from clip_jax.models.layers import LayerNorm, Linear, shard_batch, torch_linear_init
from clip_jax.models.patch_dropout import num_kept_patches
from clip_jax.models.positions import resize_positions
from clip_jax.models.towers.base import ImageTower, Shapes, side_of_grid
from clip_jax.models.towers.transformer_tower import TransformerTower, transformer_fields
from clip_jax.models.transformer import vision_initializers

# Number of heads by width, for open_clip's models whose heads are not 64 wide: ViT-H, ViT-g, ViT-bigG and ViT-e.
PUBLISHED_HEADS = {1280: 16, 1408: 16, 1664: 16, 1792: 16}


@dataclasses.dataclass(frozen=True)
class VisionTransformerPreset(TransformerTower, ImageTower):
    """Describes a Vision Transformer.

    Attributes:
      image_size: in pixels.
      patch_size: in pixels.
      width: features of a token.
      activation: one of :data:`clip_jax.models.activations.ACTIVATIONS`.
      mlp_ratio: the MLP's width divided by ``width``.
    """

    name = "vision_transformer"
    positions = ("positional_embedding",)
    # The paper's linear probe uses the input of the projection (section A.3).
    feature_layer = "ln_post"

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    activation: str = "quick_gelu"
    mlp_ratio: float = 4.0

    @property
    def title(self) -> str:
        return f"Vision Transformer with patches of {self.patch_size}"

    @property
    def side_unit(self) -> int:
        return self.patch_size

    def build(self, embed_dim: int, execution: Execution) -> nn.Module:
        return VisionTransformer(self, embed_dim, execution)

    def problems(self, prefix: str) -> list[str]:
        problems = super().problems(prefix)
        if self.image_size % self.patch_size:
            problems.append(f"{prefix}.patch_size={self.patch_size} must divide image_size={self.image_size}")
        return problems

    def num_patches(self, image_size: int) -> int:
        return self.grid_side(image_size) ** 2

    def flops(self, embed_dim: int, patch_dropout: float) -> int:
        patches = num_kept_patches(self.num_patches(self.image_size), patch_dropout)
        first = 2 * patches * 3 * self.patch_size**2 * self.width
        return 2 * first + 3 * (self.layer_flops(patches + 1) + 2 * self.width * embed_dim)

    @classmethod
    def from_shapes(cls, shapes: Shapes, activation: str) -> "VisionTransformerPreset":
        patch_features, _ = shapes.shape("patch_embedding.kernel")
        num_positions, _ = shapes.shape("positional_embedding")
        patch_size = math.isqrt(patch_features // 3)
        image_size = side_of_grid(num_positions) * patch_size
        fields = transformer_fields(shapes, cls.section, PUBLISHED_HEADS)
        return cls(image_size, patch_size, activation=activation, **fields)


def split_into_patches(images: jax.Array, patch_size: int) -> jax.Array:
    """Returns patches ``[B, (H / P) * (W / P), P * P * 3]`` of ``[B, H, W, 3]``, row by row, channels last."""
    batch, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch, rows, patch_size, columns, patch_size, channels).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(batch, rows * columns, patch_size * patch_size * channels)


class VisionTransformer(nn.Module):
    """Patches, class token, positions, norm, blocks, norm of the class token, projection without bias.

    Maps normalized images ``[B, S, S, 3]`` to features ``[B, embed_dim]`` in ``execution.dtype``, not of unit length.
    If S is not ``image_size``, the positions are resized. With ``kept_patches`` int32 ``[B, K]`` only these patches
    are computed. ``train`` has no effect: only a ResNet uses it. The patch embedding is a convolution whose stride
    equals its kernel size, computed as a matrix product.
    """

    preset: VisionTransformerPreset
    embed_dim: int
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, kept_patches: jax.Array | None = None) -> jax.Array:
        preset, execution, dtype = self.preset, self.execution, self.execution.dtype
        normal = nn.initializers.normal(preset.width**-0.5)
        patches = split_into_patches(images.astype(dtype), preset.patch_size)  # [B, N, P * P * 3]
        if kept_patches is not None:
            patches = jnp.take_along_axis(patches, kept_patches[:, :, None], axis=1)  # [B, K, P * P * 3]
        patch_init = torch_linear_init(patches.shape[-1])
        linear = functools.partial(Linear, execution=execution)
        x = linear(preset.width, ("patch", "embed"), patch_init, name="patch_embedding")(patches)

        class_embedding = self.param(
            "class_embedding", nn.with_logical_partitioning(normal, ("embed",)), (preset.width,)
        )
        class_token = jnp.broadcast_to(class_embedding.astype(dtype), (x.shape[0], 1, preset.width))
        positions = self.param(
            "positional_embedding",
            nn.with_logical_partitioning(normal, ("position", "embed")),
            (preset.num_patches(preset.image_size) + 1, preset.width),
        )
        positions = resize_positions(positions, preset.grid_side(images.shape[1])).astype(dtype)
        patch_positions = positions[1:]  # [N, W]
        if kept_patches is not None:
            # Not jnp.take, whose gradient is a scatter, slow on a TPU. The gradient of a product is a product.
            one_hot = jax.nn.one_hot(kept_patches, len(patch_positions), dtype=dtype)
            patch_positions = jnp.einsum("bkn,nw->bkw", one_hot, patch_positions, precision=jax.lax.Precision.HIGHEST)
        segments = (class_token + positions[:1], x + patch_positions)  # [B, 1, W], [B, N or K, W]
        if not execution.class_token_apart:
            segments = (jnp.concatenate(segments, axis=1),)
        ln_pre = LayerNorm(execution, name="ln_pre")
        segments = tuple(shard_batch(ln_pre(shard_batch(x, execution)), execution) for x in segments)
        x = preset.transformer(vision_initializers(preset.width, preset.mlp_width), execution)(
            segments, read=lambda segments: segments[0][:, :1]
        )  # [B, W], of the class token
        x = LayerNorm(execution, name="ln_post")(x)
        return linear(self.embed_dim, ("embed", "output"), normal, name="projection")(x)
