"""Descriptions of the published models and of small ones.

Sizes are those of the paper (arXiv 2103.00020, tables 19 and 20) and of the weights that OpenAI published.
Heads are 64 wide, as in all of the paper's transformers.
"""

import dataclasses
from typing import Any

import ml_collections

from clip_jax.models.execution import REMAT_POLICIES
from clip_jax.models.preprocessing import OPENAI_PREPROCESSING, Preprocessing
from clip_jax.models.towers import IMAGE_TOWERS, TEXT_TOWERS, tower_from_dict
from clip_jax.models.towers.base import ImageTower, TextTower
from clip_jax.models.towers.resnet import ResNetPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.models.towers.vision_transformer import VisionTransformerPreset
from clip_jax.settings import DTYPES, may_change, must_be, must_be_one_of, must_not_be_negative, read_section


@dataclasses.dataclass(frozen=True)
class CLIPPreset:
    """Describes a model: two towers, the width ``embed_dim`` of their shared space, and image preprocessing."""

    embed_dim: int
    vision: ImageTower
    text: TextTower
    preprocessing: Preprocessing = OPENAI_PREPROCESSING

    @property
    def fused_head_widths(self) -> tuple[float, ...]:
        """Head widths of the attention layers that cuDNN may compute, in both towers."""
        return self.vision.fused_head_widths + self.text.fused_head_widths


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Defaults of the keys of ``config.model`` that are not fields of the preset."""

    remat: str = may_change("none")  # or "lite", "attention", "full": how much of a layer the backward pass recomputes
    patch_dropout: float = 0.0  # share of an image's patches that training leaves out, drawn anew at each step
    dtype: str = "bfloat16"  # of the computation; parameters are float32
    scan_unroll: int = may_change(0)  # layers in one step of the scan over layers; 0: by device
    fused_attention: bool = may_change(True)  # by cuDNN if possible: on a GPU, in bfloat16

    def problems(self) -> list[str]:
        """Returns one line for each invalid value."""
        prefix = "config.model"
        return [
            *must_be_one_of(self, "dtype", DTYPES, prefix),
            *must_be_one_of(self, "remat", REMAT_POLICIES, prefix),
            *must_not_be_negative(self, ("scan_unroll",), prefix),
            *must_be(0 <= self.patch_dropout < 1, f"{prefix}.patch_dropout={self.patch_dropout} must be in [0, 1)"),
        ]


_TEXT_512 = TextTransformerPreset(width=512, num_layers=12, num_heads=8)
_TEXT_640 = TextTransformerPreset(width=640, num_layers=12, num_heads=10)
_TEXT_768 = TextTransformerPreset(width=768, num_layers=12, num_heads=12)
_TEXT_1024 = TextTransformerPreset(width=1024, num_layers=12, num_heads=16)

PRESETS: dict[str, CLIPPreset] = {
    "RN50": CLIPPreset(1024, ResNetPreset(224, 64, (3, 4, 6, 3), 32), _TEXT_512),
    "RN101": CLIPPreset(512, ResNetPreset(224, 64, (3, 4, 23, 3), 32), _TEXT_512),
    "RN50x4": CLIPPreset(640, ResNetPreset(288, 80, (4, 6, 10, 6), 40), _TEXT_640),
    "RN50x16": CLIPPreset(768, ResNetPreset(384, 96, (6, 8, 18, 8), 48), _TEXT_768),
    "RN50x64": CLIPPreset(1024, ResNetPreset(448, 128, (3, 15, 36, 10), 64), _TEXT_1024),
    "ViT-B/32": CLIPPreset(512, VisionTransformerPreset(224, 32, 768, 12, 12), _TEXT_512),
    "ViT-B/16": CLIPPreset(512, VisionTransformerPreset(224, 16, 768, 12, 12), _TEXT_512),
    "ViT-L/14": CLIPPreset(768, VisionTransformerPreset(224, 14, 1024, 24, 16), _TEXT_768),
    "ViT-L/14@336": CLIPPreset(768, VisionTransformerPreset(336, 14, 1024, 24, 16), _TEXT_768),
    # Not in the paper: one to train on a single accelerator, and one for a CPU.
    "ViT-S/16": CLIPPreset(384, VisionTransformerPreset(224, 16, 384, 12, 6), TextTransformerPreset(384, 12, 6)),
    "ViT-tiny": CLIPPreset(
        128, VisionTransformerPreset(32, 16, 128, 2, 2), TextTransformerPreset(64, 1, 1, context_length=24)
    ),
}


def preset_from_dict(model: dict[str, Any]) -> CLIPPreset:
    """Returns the preset for the result of ``dataclasses.asdict``, also through JSON. Other keys are ignored.

    If ``preprocessing`` is missing, as in older configs, it is OpenAI's.

    Raises:
      ValueError: no tower has the fields of ``vision`` or ``text``.
    """
    vision = tower_from_dict(model["vision"], IMAGE_TOWERS, "config.model.vision")
    text = tower_from_dict(model["text"], TEXT_TOWERS, "config.model.text")
    preprocessing = dict(model.get("preprocessing", {}))
    for name in preprocessing.keys() & {"mean", "std"}:
        preprocessing[name] = tuple(preprocessing[name])
    if preprocessing.get("resize_size") == vision.image_size:
        preprocessing["resize_size"] = 0  # equal, and the default
    return CLIPPreset(model["embed_dim"], vision, text, Preprocessing(**preprocessing))


def model_preset(config: ml_collections.ConfigDict) -> CLIPPreset:
    """Returns the model of ``config.model``: its preset with all overrides."""
    return preset_from_dict(config.model.to_dict())


def get_preset(name: str) -> CLIPPreset:
    """Returns the preset of this name.

    Raises:
      ValueError: it is unknown; the message lists all presets.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def problems(model: ml_collections.ConfigDict) -> list[str]:
    """Returns one line for each mistake in the section ``config.model``."""
    found = read_section(ModelSettings, model).problems()
    sizes = {"embed_dim": model.embed_dim}
    sizes |= {f"{section}.{name}": value for section in ("vision", "text") for name, value in model[section].items()}
    too_small = [name for name, value in sizes.items() if type(value) is int and value <= 0]
    found += [f"config.model.{name}={sizes[name]} must be positive" for name in too_small]
    try:
        preset = preset_from_dict(model.to_dict())
    except ValueError as error:
        return [*found, str(error)]
    found += preset.preprocessing.problems("config.model.preprocessing", preset.vision.image_size)
    if not too_small:
        found += preset.vision.problems("config.model.vision") + preset.text.problems("config.model.text")
        if model.patch_dropout and preset.vision.num_patches(preset.vision.image_size) is None:
            found.append(f"config.model.patch_dropout: a {preset.vision.title} has no patches to leave out")
    return found
