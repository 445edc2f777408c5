"""Computes by formula how many flops a training step needs, without recomputation, padding or other overhead.

Matrix products and convolutions count, with two flops for each multiply-add, as is usual for model flops utilization.
Each of a product's two gradients costs as much as the product, so a step costs three forward passes, except for the
first layer, whose input needs no gradient. Attention counts in full, masked or not. A transformer's last layer counts
only for the position that the tower reads, but with the keys and values of all positions.
"""

from clip_jax.models.presets import CLIPPreset


def tower_flops(preset: CLIPPreset, patch_dropout: float = 0.0) -> dict[str, int]:
    """Forward and backward flops of one pair: ``{"vision tower": ..., "text tower": ...}``."""
    return {
        "vision tower": preset.vision.flops(preset.embed_dim, patch_dropout),
        "text tower": preset.text.flops(preset.embed_dim),
    }


def loss_flops(global_batch_size: int, embed_dim: int) -> int:
    """Flops of the N x N similarities, each computed once, and of both gradients."""
    return 3 * 2 * global_batch_size**2 * embed_dim


def step_flops(preset: CLIPPreset, global_batch_size: int, patch_dropout: float = 0.0) -> dict[str, int]:
    """Flops of one step over all chips, by part."""
    towers = {name: global_batch_size * flops for name, flops in tower_flops(preset, patch_dropout).items()}
    return towers | {"loss": loss_flops(global_batch_size, preset.embed_dim)}
