"""The flops that a step needs, by formula: no recomputation, no padding, no detour that an implementation takes.

Counted are matrix products and convolutions, two flops a multiply-add, as is usual for model flops utilization. A
product costs as much again for each of its two gradients, so a step is three times the forward pass, but for the first
layer, whose input needs no gradient. Attention counts in full, masked or not. Of a transformer's last layer only the
position that the tower reads is needed, and the keys and values of all.
"""

from clip_jax.models.presets import RESNET_REDUCTION, CLIPPreset, ResNetPreset, VisionTransformerPreset
from clip_jax.models.vision_transformer import num_kept_patches


def _transformer(tokens: int, width: int, mlp_width: int, num_layers: int) -> int:
    """Forward flops of a sequence of ``tokens`` through all layers, to one position of the last."""
    keys_and_values = 2 * width * width
    others = 2 * width * width + 2 * width * mlp_width  # queries, the attention's output, the two of the MLP

    def layer(positions: int) -> int:
        return 2 * (tokens * keys_and_values + positions * others) + 2 * 2 * positions * tokens * width

    return (num_layers - 1) * layer(tokens) + layer(1)


def _vision_transformer(preset: VisionTransformerPreset, embed_dim: int, patch_dropout: float) -> tuple[int, int]:
    patches = num_kept_patches((preset.image_size // preset.patch_size) ** 2, patch_dropout)
    first = 2 * patches * 3 * preset.patch_size**2 * preset.width
    layers = _transformer(patches + 1, preset.width, round(preset.width * preset.mlp_ratio), preset.num_layers)
    return first, layers + 2 * preset.width * embed_dim


def _resnet(preset: ResNetPreset, embed_dim: int) -> tuple[int, int]:
    """A convolution costs as a product of each output place with its kernel; places beyond the border are zeros."""

    def convolution(side: int, kernel: int, channels: int, features: int, stride: int = 1) -> int:
        places = sum(  # along one axis: the kernel's places that meet the picture, over all outputs
            sum(0 <= stride * output + offset - kernel // 2 < side for offset in range(kernel))
            for output in range(side // stride)
        )
        return 2 * places**2 * channels * features

    side, half = preset.image_size, preset.width // 2
    first = convolution(side, 3, 3, half, stride=2)
    side //= 2
    rest = convolution(side, 3, half, half) + convolution(side, 3, half, preset.width)
    side //= 2
    channels = preset.width
    for stage, num_blocks in enumerate(preset.stage_sizes):
        width = preset.width * 2**stage
        for block in range(num_blocks):
            stride = 2 if stage and not block else 1
            rest += convolution(side, 1, channels, width) + convolution(side, 3, width, width)
            side //= stride
            rest += convolution(side, 1, width, 4 * width)
            if channels != 4 * width:
                rest += convolution(side, 1, channels, 4 * width)  # the shortcut's
            channels = 4 * width
    width = RESNET_REDUCTION * preset.width
    places = side * side + 1
    pool = 2 * width * width * (1 + 2 * places) + 2 * 2 * places * width + 2 * width * embed_dim
    return first, rest + pool


def tower_flops(preset: CLIPPreset, patch_dropout: float = 0.0) -> dict[str, int]:
    """Forward and backward flops of one pair: ``{"vision tower": ..., "text tower": ...}``."""
    vision, text = preset.vision, preset.text
    if isinstance(vision, ResNetPreset):
        first, rest = _resnet(vision, preset.embed_dim)
    else:
        first, rest = _vision_transformer(vision, preset.embed_dim, patch_dropout)
    layers = _transformer(text.context_length, text.width, round(text.width * text.mlp_ratio), text.num_layers)
    return {
        "vision tower": 2 * first + 3 * rest,
        "text tower": 3 * (layers + 2 * text.width * preset.embed_dim),
    }


def loss_flops(global_batch_size: int, embed_dim: int) -> int:
    """The N x N similarities, each once, and both gradients."""
    return 3 * 2 * global_batch_size**2 * embed_dim


def step_flops(preset: CLIPPreset, global_batch_size: int, patch_dropout: float = 0.0) -> dict[str, int]:
    """All that one step needs, over all chips, by part."""
    towers = {name: global_batch_size * flops for name, flops in tower_flops(preset, patch_dropout).items()}
    return towers | {"loss": loss_flops(global_batch_size, preset.embed_dim)}
