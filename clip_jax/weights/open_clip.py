"""Reads and writes open_clip's files: OpenAI's tensor names, and a config that states the activation and the heads.

``open_clip.create_model("local-dir:FOLDER")`` loads a folder of ``open_clip_config.json`` and
``open_clip_model.safetensors``. ``create_model(NAME, pretrained=FILE)`` loads a single file.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

from safetensors.numpy import save_file

from clip_jax.models.preprocessing import IMAGE_MEAN, IMAGE_STD, RESIZE_MODES, Preprocessing
from clip_jax.models.presets import CLIPPreset
from clip_jax.models.towers.resnet import RESNET_REDUCTION, ResNetPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.models.towers.transformer_tower import HEAD_WIDTH
from clip_jax.models.towers.vision_transformer import VisionTransformerPreset
from clip_jax.weights import openai
from clip_jax.weights.huggingface_fields import mapping, side_of, triple
from clip_jax.weights.mapping import SCALAR, WeightsError, row, to_tensors

CONFIG_FILE = "open_clip_config.json"
# In the order in which open_clip looks for them.
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
TABLE = openai.TABLE._replace(format="open_clip", optional=row("logit_bias", "logit_bias", SCALAR))

# Keys that are used here or have no effect on inference.
_VISION_KEYS = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"}
_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_MODEL_KEYS = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "init_logit_scale", "init_logit_bias"}
# Keys that a config may have with their default value only.
_DEFAULTS = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",)}
# From open_clip's PreprocessCfg. "random" is random in training only; evaluation is bicubic (its transform.py).
_INTERPOLATIONS = {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}


def read_config(config: dict) -> CLIPPreset:
    """The preset that an ``open_clip_config.json`` describes.

    Raises:
      WeightsError: it describes a model that is not implemented here; the message names the keys.
    """
    model = config.get("model_cfg", config)
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    parts = (("", model, _MODEL_KEYS), ("vision_cfg.", vision, _VISION_KEYS), ("text_cfg.", text, _TEXT_KEYS))
    unknown = [
        f"{prefix}{key}={value!r}"
        for prefix, part, known in parts
        for key, value in part.items()
        if key not in known and (value not in _DEFAULTS[key] if key in _DEFAULTS else value)
    ]
    if unknown:
        raise WeightsError(f"{CONFIG_FILE} describes a model that clip_jax does not support: {', '.join(unknown)}")
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    # Missing keys have open_clip's defaults (CLIPVisionCfg and CLIPTextCfg in its model.py).
    width, head_width = vision.get("width", 768), vision.get("head_width", HEAD_WIDTH)
    layers, image_size = vision.get("layers", 12), side_of("vision_cfg.image_size", vision.get("image_size", 224))
    try:
        if isinstance(layers, list):
            heads = width * RESNET_REDUCTION // head_width
            vision_preset = ResNetPreset(image_size, width, tuple(layers), heads)
        else:
            ratio = int(width * vision.get("mlp_ratio", 4.0)) / width
            vision_preset = VisionTransformerPreset(
                image_size,
                side_of("vision_cfg.patch_size", vision.get("patch_size", 16)),
                width,
                layers,
                width // head_width,
                activation,
                ratio,
            )
        width = text.get("width", 512)
        text_preset = TextTransformerPreset(
            width,
            text.get("layers", 12),
            text.get("heads", 8),
            text.get("context_length", 77),
            text.get("vocab_size", 49_408),
            activation,
            int(width * text.get("mlp_ratio", 4.0)) / width,
        )
        given = mapping(f"{CONFIG_FILE}: preprocess_cfg", config.get("preprocess_cfg"))
        preprocessing = _read_preprocessing(given, image_size)
        return CLIPPreset(model["embed_dim"], vision_preset, text_preset, preprocessing)
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{CONFIG_FILE} is not a whole config: {type(error).__name__} {error}") from None


def _read_preprocessing(config: Mapping, image_size: int) -> Preprocessing:
    """The preprocessing in ``preprocess_cfg``. Missing and empty keys have OpenAI's values, as in open_clip."""
    given = {key: value for key, value in config.items() if value is not None}
    where = f"{CONFIG_FILE}: preprocess_cfg"
    fields = {
        "mean": triple(f"{where}.mean", given.pop("mean", None) or IMAGE_MEAN),
        "std": triple(f"{where}.std", given.pop("std", None) or IMAGE_STD, positive=True),
        "resize_mode": given.pop("resize_mode", None) or "shortest",
        "fill_color": given.pop("fill_color", 0),
    }
    interpolation = given.pop("interpolation", None) or "bicubic"
    wrong = []
    if fields["resize_mode"] not in list(RESIZE_MODES):
        wrong.append(f"resize_mode={fields['resize_mode']!r} is not one of {', '.join(RESIZE_MODES)}")
    if interpolation not in list(_INTERPOLATIONS):
        wrong.append(f"interpolation={interpolation!r} is not one of {', '.join(_INTERPOLATIONS)}")
    if type(fields["fill_color"]) is not int or not 0 <= fields["fill_color"] <= 255:
        wrong.append(f"fill_color={fields['fill_color']!r} is not a level of gray, 0 to 255")
    if (mode := given.pop("mode", "RGB")) != "RGB":
        wrong.append(f"mode={mode!r} is not RGB")
    size = given.pop("size", image_size)
    if side_of(f"{where}.size", size) != image_size:
        wrong.append(f"size={size!r} is not the model's image size {image_size}")
    wrong += [f"{key}={value!r} is not known here" for key, value in given.items() if value]
    if wrong:
        raise WeightsError(f"{where}: {'; '.join(wrong)}")
    return Preprocessing(interpolation=_INTERPOLATIONS[interpolation], **fields)


def _preprocessing_config(preprocessing: Preprocessing) -> dict:
    if preprocessing.resize_size:
        raise WeightsError(
            "open_clip resizes images to the model's size, and this model resizes them to "
            f"{preprocessing.resize_size} pixels before the crop; write it --to=clip_jax or huggingface"
        )
    if preprocessing.interpolation not in _INTERPOLATIONS:
        raise WeightsError(f"open_clip has no {preprocessing.interpolation} interpolation, only bicubic and bilinear")
    fields = dataclasses.asdict(preprocessing) | {"mean": list(preprocessing.mean), "std": list(preprocessing.std)}
    del fields["resize_size"]
    return fields


def _mlp_ratio(tower: VisionTransformerPreset | TextTransformerPreset) -> dict:
    # open_clip truncates width * ratio and we round it. An extra 0.5 gives the same width in both.
    ratio = tower.mlp_ratio
    return {"mlp_ratio": ratio if ratio == int(ratio) else (round(tower.width * ratio) + 0.5) / tower.width}


def _vision_transformer_config(tower: VisionTransformerPreset) -> dict:
    return {"layers": tower.num_layers, "patch_size": tower.patch_size, **_mlp_ratio(tower)}


def _resnet_config(tower: ResNetPreset) -> dict:
    return {"layers": list(tower.stage_sizes), "patch_size": None}


# The keys of ``vision_cfg`` for each tower of the table, in addition to the sizes that all towers have.
_VISION_CONFIGS = {"vision_transformer": _vision_transformer_config, "resnet": _resnet_config}


def constructor_arguments(params: dict) -> dict[str, float]:
    """The arguments that open_clip's constructors need for a model with these ``params``, apart from its architecture.

    Without ``init_logit_bias``, open_clip's model has no ``logit_bias``. Its value comes from the weights.
    """
    return {"init_logit_bias": -10.0} if "logit_bias" in params else {}


def config_of(preset: CLIPPreset, arguments: dict[str, float] | None = None) -> dict:
    """The ``open_clip_config.json`` of this preset.

    ``arguments`` are those of :func:`constructor_arguments`.

    Raises:
      WeightsError: open_clip does not have this preprocessing, or the towers have different activations.
    """
    vision, text = preset.vision, preset.text
    if vision.activation not in (None, text.activation):
        raise WeightsError("open_clip has one activation for both towers, and this model has two")
    return {
        "model_cfg": {
            "embed_dim": preset.embed_dim,
            "quick_gelu": text.activation == "quick_gelu",
            **(arguments or {}),
            "vision_cfg": {
                "image_size": vision.image_size,
                "width": vision.width,
                "head_width": int(vision.head_width),
                **_VISION_CONFIGS[vision.name](vision),
            },
            "text_cfg": {
                "context_length": text.context_length,
                "vocab_size": text.vocab_size,
                "width": text.width,
                "heads": text.num_heads,
                "layers": text.num_layers,
                **_mlp_ratio(text),
            },
        },
        "preprocess_cfg": _preprocessing_config(preset.preprocessing),
    }


def _config_for(variables: dict, preset: CLIPPreset) -> dict:
    return config_of(preset, constructor_arguments(variables["params"]))


def write_folder(folder: pathlib.Path, variables: dict, preset: CLIPPreset) -> None:
    """Writes config and weights into an existing folder."""
    (folder / CONFIG_FILE).write_text(json.dumps(_config_for(variables, preset), indent=2) + "\n")
    save_file(to_tensors(variables, TABLE, preset), folder / WEIGHT_FILES[0], metadata={"format": "pt"})


def write_file(path: pathlib.Path, variables: dict, preset: CLIPPreset) -> None:
    """Writes a single ``.safetensors`` file. Its metadata has the config, which only this project reads."""
    metadata = {"format": "pt", CONFIG_FILE: json.dumps(_config_for(variables, preset))}
    save_file(to_tensors(variables, TABLE, preset), path, metadata=metadata)
