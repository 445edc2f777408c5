"""The published models, and small ones, as data: a preset is a description, never code.

Sizes are those of the paper (arXiv 2103.00020, tables 19 and 20) and of the weights that OpenAI published.
Heads are 64 wide throughout, as in all of the paper's transformers, except where a small preset says otherwise.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class VisionTransformerPreset:
    """An image tower: ``image_size`` and ``patch_size`` in pixels, ``width`` the token's feature count."""

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int


@dataclasses.dataclass(frozen=True)
class TextTransformerPreset:
    """A text tower over ``context_length`` byte-pair tokens."""

    width: int
    num_layers: int
    num_heads: int
    context_length: int = 77
    vocab_size: int = 49_408


@dataclasses.dataclass(frozen=True)
class CLIPPreset:
    """Two towers and the width ``embed_dim`` of the space that they share."""

    embed_dim: int
    vision: VisionTransformerPreset
    text: TextTransformerPreset


_TEXT_512 = TextTransformerPreset(width=512, num_layers=12, num_heads=8)
_TEXT_768 = TextTransformerPreset(width=768, num_layers=12, num_heads=12)

PRESETS: dict[str, CLIPPreset] = {
    "ViT-B/32": CLIPPreset(512, VisionTransformerPreset(224, 32, 768, 12, 12), _TEXT_512),
    "ViT-B/16": CLIPPreset(512, VisionTransformerPreset(224, 16, 768, 12, 12), _TEXT_512),
    "ViT-L/14": CLIPPreset(768, VisionTransformerPreset(224, 14, 1024, 24, 16), _TEXT_768),
    "ViT-L/14@336": CLIPPreset(768, VisionTransformerPreset(336, 14, 1024, 24, 16), _TEXT_768),
    # Not in the paper: for one accelerator, and for a CPU in minutes.
    "ViT-S/16": CLIPPreset(384, VisionTransformerPreset(224, 16, 384, 12, 6), TextTransformerPreset(384, 12, 6)),
    "ViT-tiny": CLIPPreset(
        128, VisionTransformerPreset(32, 16, 128, 2, 2), TextTransformerPreset(64, 1, 1, context_length=24)
    ),
}


def get_preset(name: str) -> CLIPPreset:
    """Returns the preset of this name.

    Raises:
      ValueError: there is none; the message lists those that there are.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
