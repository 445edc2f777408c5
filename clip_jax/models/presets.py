"""The published models, and small ones, as data: a preset is a description, never code.

Sizes are those of the paper (arXiv 2103.00020, tables 19 and 20) and of the weights that OpenAI published.
Heads are 64 wide throughout, as in all of the paper's transformers, unless a preset from elsewhere differs.
"""

import dataclasses

import ml_collections

ACTIVATIONS = ("quick_gelu", "gelu")  # OpenAI's, and PyTorch's default, which most of open_clip's own models have
BATCH_NORMS = ("global", "per_device")
RESNET_REDUCTION = 32  # an image's side over that of the last stage's output; also its channels over the width

# Mean and standard deviation of CLIP's training images, RGB in [0, 1], as published with its weights.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
SMALLEST_STD = 1e-6  # a deviation near 0 is a mistake, and would make pixels infinite in float32
MAX_RESIZE = 8  # times the image size: a larger size before the crop is a mistake that takes all memory
RESIZE_MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "hamming", "box", "nearest")  # Pillow's


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image of any size becomes the square that the image tower sees. The default is OpenAI's.

    The image is resized to ``resize_size`` pixels (0: the tower's image size), with Pillow's ``interpolation``. By
    ``resize_mode`` that is the length of its short side ("shortest"), its long side ("longest") or both, whatever
    its aspect ratio ("squash"). Then its center is cropped, or padded with the gray level ``fill_color`` (0 to 255),
    to the tower's image size. ``mean`` and ``std``, of RGB in [0, 1], are subtracted and divided by.

    Source: open_clip's ``PreprocessCfg`` and the image processors of Hugging Face's CLIP.
    """

    mean: tuple[float, float, float] = IMAGE_MEAN
    std: tuple[float, float, float] = IMAGE_STD
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    resize_size: int = 0
    fill_color: int = 0

    def at_image_size(self, image_size: int, wanted: int) -> "Preprocessing":
        """The same for images of ``wanted`` pixels, where this one is for ``image_size``: the same part is cropped."""
        return dataclasses.replace(self, resize_size=round(self.resize_size * wanted / image_size))


@dataclasses.dataclass(frozen=True)
class VisionTransformerPreset:
    """A Vision Transformer: ``image_size`` and ``patch_size`` in pixels, ``width`` the token's feature count.

    ``activation`` is one of :data:`ACTIVATIONS`; ``mlp_ratio`` is the MLP's width over ``width``.
    """

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    activation: str = "quick_gelu"
    mlp_ratio: float = 4.0


@dataclasses.dataclass(frozen=True)
class ResNetPreset:
    """A ResNet as CLIP has it: ``width`` channels after the stem, ``stage_sizes`` blocks in each of four stages.

    ``num_heads`` are those of the attention pooling. ``batch_norm`` says over what a training step takes BatchNorm's
    statistics: "global", the whole batch, or "per_device", each device's part of it, as open_clip trains.
    """

    image_size: int
    width: int
    stage_sizes: tuple[int, int, int, int]
    num_heads: int
    batch_norm: str = "global"


@dataclasses.dataclass(frozen=True)
class TextTransformerPreset:
    """A text tower over ``context_length`` byte-pair tokens."""

    width: int
    num_layers: int
    num_heads: int
    context_length: int = 77
    vocab_size: int = 49_408
    activation: str = "quick_gelu"
    mlp_ratio: float = 4.0


@dataclasses.dataclass(frozen=True)
class CLIPPreset:
    """Two towers, the width ``embed_dim`` of the space that they share, and how images are prepared."""

    embed_dim: int
    vision: VisionTransformerPreset | ResNetPreset
    text: TextTransformerPreset
    preprocessing: Preprocessing = Preprocessing()


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
    # Not in the paper: for one accelerator, and for a CPU in minutes.
    "ViT-S/16": CLIPPreset(384, VisionTransformerPreset(224, 16, 384, 12, 6), TextTransformerPreset(384, 12, 6)),
    "ViT-tiny": CLIPPreset(
        128, VisionTransformerPreset(32, 16, 128, 2, 2), TextTransformerPreset(64, 1, 1, context_length=24)
    ),
}


def preset_from_dict(model: dict) -> CLIPPreset:
    """Reads back what ``dataclasses.asdict`` made of a preset, through JSON or not; other keys are passed over.

    Without ``preprocessing``, as in runs of before there was a choice, it is OpenAI's.
    """
    vision = dict(model["vision"])
    if "stage_sizes" in vision:
        vision["stage_sizes"] = tuple(vision["stage_sizes"])
    tower = ResNetPreset if "stage_sizes" in vision else VisionTransformerPreset
    preprocessing = dict(model.get("preprocessing", {}))
    for name in preprocessing.keys() & {"mean", "std"}:
        preprocessing[name] = tuple(preprocessing[name])
    if preprocessing.get("resize_size") == vision["image_size"]:
        preprocessing["resize_size"] = 0  # the same, by its usual name
    text = TextTransformerPreset(**model["text"])
    return CLIPPreset(model["embed_dim"], tower(**vision), text, Preprocessing(**preprocessing))


def model_preset(config: ml_collections.ConfigDict) -> CLIPPreset:
    """The model that ``config.model`` describes: its preset with whatever was overridden."""
    return preset_from_dict(config.model.to_dict())


def get_preset(name: str) -> CLIPPreset:
    """Returns the preset of this name.

    Raises:
      ValueError: there is none; the message lists those that there are.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
