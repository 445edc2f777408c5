"""The flops that a step needs, by formula: no recomputation, no padding, no detour that an implementation takes.

Counted are matrix products and convolutions, two flops a multiply-add, as is usual for model flops utilization. A
product costs as much again for each of its two gradients, so a step is three times the forward pass, but for the first
layer, whose input needs no gradient. Attention counts in full, masked or not. Of a transformer's last layer only the
position that the tower reads is needed, and the keys and values of all.
"""

from clip_jax.models.presets import CLIPPreset


def tower_flops(preset: CLIPPreset, patch_dropout: float = 0.0) -> dict[str, int]:
    """Forward and backward flops of one pair: ``{"vision tower": ..., "text tower": ...}``."""
    return {
        "vision tower": preset.vision.flops(preset.embed_dim, patch_dropout),
        "text tower": preset.text.flops(preset.embed_dim),
    }


def loss_flops(global_batch_size: int, embed_dim: int) -> int:
    """The N x N similarities, each once, and both gradients."""
    return 3 * 2 * global_batch_size**2 * embed_dim


def step_flops(preset: CLIPPreset, global_batch_size: int, patch_dropout: float = 0.0) -> dict[str, int]:
    """All that one step needs, over all chips, by part."""
    towers = {name: global_batch_size * flops for name, flops in tower_flops(preset, patch_dropout).items()}
    return towers | {"loss": loss_flops(global_batch_size, preset.embed_dim)}
