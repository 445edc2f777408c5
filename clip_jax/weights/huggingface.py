"""Reads and writes Hugging Face's ``CLIPModel``: tensor names and layouts, config, and the files of the tokenizer."""

import json
import pathlib
import re

from safetensors.numpy import save_file

from clip_jax.data.tokenizer import END_OF_TEXT, SPECIAL_TOKENS, published_vocabulary
from clip_jax.models.activations import ACTIVATIONS
from clip_jax.models.preprocessing import Preprocessing
from clip_jax.models.presets import CLIPPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.models.towers.vision_transformer import VisionTransformerPreset
from clip_jax.weights import huggingface_fields
from clip_jax.weights.huggingface_fields import (
    MODEL_FIELDS,
    TEXT_FIELDS,
    VISION_FIELDS,
    mapping,
    preprocessing_config,
    refuse_unknown,
    side_of,
)
from clip_jax.weights.mapping import (
    PATCHES,
    SCALAR,
    TRANSPOSED,
    Row,
    Table,
    WeightsError,
    linear,
    norm,
    row,
    to_tensors,
)
from clip_jax.weights.tensor_files import read_json

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # the second one since transformers 5


def _blocks(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        *norm(f"{ours}.ln_1", f"{theirs}.layer_norm1"),
        *linear(f"{ours}.qkv", *(f"{theirs}.self_attn.{part}_proj" for part in "qkv")),
        *linear(f"{ours}.attention_output", f"{theirs}.self_attn.out_proj"),
        *norm(f"{ours}.ln_2", f"{theirs}.layer_norm2"),
        *linear(f"{ours}.fc1", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}.fc2", f"{theirs}.mlp.fc2"),
    )


TABLE = Table(
    format="Hugging Face",
    towers={
        "vision_transformer": (
            *row("vision.class_embedding", "vision_model.embeddings.class_embedding"),
            *row("vision.patch_embedding.kernel", "vision_model.embeddings.patch_embedding.weight", PATCHES),
            *row("vision.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
            *norm("vision.ln_pre", "vision_model.pre_layrnorm"),  # their spelling
            *_blocks("vision.transformer.blocks", "vision_model.encoder.layers.{layer}"),
            *norm("vision.ln_post", "vision_model.post_layernorm"),
            *row("vision.projection.kernel", "visual_projection.weight", TRANSPOSED),
        ),
        "text_transformer": (
            *row("text.token_embedding", "text_model.embeddings.token_embedding.weight"),
            *row("text.positional_embedding", "text_model.embeddings.position_embedding.weight"),
            *_blocks("text.transformer.blocks", "text_model.encoder.layers.{layer}"),
            *norm("text.ln_final", "text_model.final_layer_norm"),
            *row("text.projection.kernel", "text_projection.weight", TRANSPOSED),
        ),
    },
    logit_scale=row("logit_scale", "logit_scale", SCALAR),
    ignored=re.compile(r"\.position_ids$"),  # 0, 1, 2, ..., in files from before 2023
)

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "vocab_size",
)
# CLIPConfig's defaults: a config may leave out keys that have their default.
_TEXT_DEFAULTS = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49_408,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "num_channels": 3,
}


def read_config(config: dict) -> CLIPPreset:
    """The preset that ``config.json`` describes.

    Raises:
      WeightsError: it is not a CLIP, or a CLIP that is not implemented here.
    """
    if config.get("model_type") != "clip":
        raise WeightsError(f"{CONFIG_FILE} is that of a {config.get('model_type')!r} model, not of a 'clip'")

    def tower(name: str, defaults: dict) -> dict:
        # If an older file has both, transformers uses "..._config_dict" and its defaults.
        older = config.get(f"{name}_config_dict")
        given = {**defaults, **mapping(f"{CONFIG_FILE}: {name}_config", config.get(f"{name}_config"))}
        return given if older is None else {**given, **defaults, **mapping(f"{CONFIG_FILE}: {name}_config_dict", older)}

    text, vision = tower("text", _TEXT_DEFAULTS), tower("vision", _VISION_DEFAULTS)
    _check_towers(config, text, vision)
    image_size, patch_size = (
        side_of(f"{CONFIG_FILE}: vision_config.{key}", vision[key]) for key in ("image_size", "patch_size")
    )

    def transformer(part: dict) -> dict:
        return {
            "width": part["hidden_size"],
            "num_layers": part["num_hidden_layers"],
            "num_heads": part["num_attention_heads"],
            "activation": part["hidden_act"],
            "mlp_ratio": part["intermediate_size"] / part["hidden_size"],
        }

    return CLIPPreset(
        config.get("projection_dim", 512),
        VisionTransformerPreset(image_size, patch_size, **transformer(vision)),
        TextTransformerPreset(
            context_length=text["max_position_embeddings"], vocab_size=text["vocab_size"], **transformer(text)
        ),
    )


def _check_towers(config: dict, text: dict, vision: dict) -> None:
    """Raises WeightsError if a field has a value that is not implemented here, or is unknown."""
    for name, part in (("text", text), ("vision", vision)):
        if part["hidden_act"] not in ACTIVATIONS:
            raise WeightsError(
                f"{CONFIG_FILE}: {name}_config.hidden_act={part['hidden_act']!r} is not supported, only "
                f"{' and '.join(ACTIVATIONS)}"
            )
        if part["layer_norm_eps"] != 1e-5:
            raise WeightsError(
                f"{CONFIG_FILE}: {name}_config.layer_norm_eps={part['layer_norm_eps']} is not CLIP's 1e-5"
            )
    vocab_size = text["vocab_size"]
    end_of_text = END_OF_TEXT if type(vocab_size) is not int or vocab_size > END_OF_TEXT else vocab_size - 1
    # In older files, 2 means the highest id of a text, and transformers reads it so.
    if (given := text.get("eos_token_id", end_of_text)) not in (2, end_of_text):
        raise WeightsError(f"{CONFIG_FILE}: text_config.eos_token_id={given} is not {end_of_text}, as CLIP's is")
    for name, part in (("text", text), ("vision", vision)):
        for field in _SIZES:
            if field in part and (type(part[field]) is not int or part[field] < 1):
                raise WeightsError(f"{CONFIG_FILE}: {name}_config.{field}={part[field]!r} is not a positive integer")
        if part["hidden_size"] % part["num_attention_heads"]:
            raise WeightsError(
                f"{CONFIG_FILE}: {name}_config.num_attention_heads={part['num_attention_heads']} does not divide "
                f"hidden_size={part['hidden_size']}"
            )
    if vision["num_channels"] != 3:
        raise WeightsError(f"{CONFIG_FILE}: vision_config.num_channels={vision['num_channels']} is not 3")
    refuse_unknown(CONFIG_FILE, config, MODEL_FIELDS)
    refuse_unknown(f"{CONFIG_FILE}: text_config", text, TEXT_FIELDS)
    refuse_unknown(f"{CONFIG_FILE}: vision_config", vision, VISION_FIELDS)


def read_preprocessing(folder: pathlib.Path, image_size: int) -> Preprocessing | None:
    """The preprocessing that the files of :data:`PREPROCESSOR_FILES` state; None if there is no such file.

    Raises:
      WeightsError: the preprocessing is not implemented here, or two files differ.
    """
    found = {
        name: preprocessing
        for name in PREPROCESSOR_FILES
        if (folder / name).is_file()
        and (preprocessing := huggingface_fields.read_preprocessing(name, read_json(folder / name), image_size))
    }
    if len(set(found.values())) > 1:
        raise WeightsError(f"{' and '.join(found)} differ in how images are prepared; remove one of the two")
    return next(iter(found.values()), None)


def config_of(preset: CLIPPreset, dtype: str = "float32") -> dict:
    """The ``config.json`` of a Vision Transformer's preset."""
    vision, text = preset.vision, preset.text

    def transformer(part: VisionTransformerPreset | TextTransformerPreset) -> dict:
        return {
            "hidden_size": part.width,
            "intermediate_size": round(part.width * part.mlp_ratio),
            "num_hidden_layers": part.num_layers,
            "num_attention_heads": part.num_heads,
            "hidden_act": part.activation,
            "layer_norm_eps": 1e-5,
            "attention_dropout": 0.0,
            "projection_dim": preset.embed_dim,
        }

    # The tokenizer's id, unless a smaller vocabulary shows that the model has another tokenizer.
    end_of_text = END_OF_TEXT if text.vocab_size > END_OF_TEXT else text.vocab_size - 1
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": preset.embed_dim,
        "logit_scale_init_value": 2.6592,
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before transformers 4.56
        "text_config": {
            "model_type": "clip_text_model",
            **transformer(text),
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "bos_token_id": end_of_text - 1,
            "eos_token_id": end_of_text,
            "pad_token_id": end_of_text,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **transformer(vision),
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": 3,
        },
    }


def write_folder(folder: pathlib.Path, variables: dict, preset: CLIPPreset) -> None:
    """Writes all files that ``CLIPModel`` and ``CLIPProcessor`` load into an existing folder.

    Raises:
      WeightsError: Hugging Face's CLIP does not have the model's preprocessing, or the parameters of its loss.
    """
    tensors = to_tensors(variables, TABLE, preset)
    dtypes = {tensor.dtype.name for tensor in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    markers = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    files = {
        CONFIG_FILE: config_of(preset, dtype),
        "preprocessor_config.json": preprocessing_config(preset.preprocessing, preset.vision.image_size),
        "special_tokens_map.json": markers,
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": preset.text.context_length,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
            **markers,
            "added_tokens_decoder": {
                str(token): {"content": content, "lstrip": False, "normalized": True, "rstrip": False}
                | {"single_word": False, "special": True}
                for content, token in SPECIAL_TOKENS.items()
            },
        },
    }
    symbols, merges = published_vocabulary()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(symbols, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHT_FILES[0], metadata={"format": "pt"})
