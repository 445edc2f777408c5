"""Every field of Hugging Face's CLIP configs, and what becomes of it here.

A field is used, has no effect on embeddings, or must have the value that is built here. A field that is in no table is
refused by its name, unless it is empty: it may change the numbers.

Source: ``CLIPConfig``, ``CLIPTextConfig``, ``CLIPVisionConfig``, ``CLIPImageProcessor`` and ``CLIPTokenizer`` of
transformers 4 and 5, and the configs that OpenAI's published folders have.
"""

from collections.abc import Collection, Mapping

from clip_jax.weights.mapping import WeightsError

# Files of before 2023 repeat these in each tower. They steer generation, training, logging and output, not CLIP's
# towers. Dropout is one of them: it is off outside of training, and trainings here have none.
# fmt: off
_NO_EFFECT = frozenset(
    [
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
        "_name_or_path", "architectures", "attention_dropout", "attn_implementation", "bad_words_ids",
        "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id",
        "diversity_penalty", "do_sample", "dropout", "dtype", "early_stopping", "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
        "gradient_checkpointing", "id2label", "initializer_factor", "initializer_range", "label2id",
        "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
        "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id",
        "prefix", "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict",
        "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
        "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p",
        "torch_dtype", "torchscript", "transformers_version", "transformers_weights", "typical_p", "use_bfloat16",
        "use_cache", "logit_scale_init_value",
    ]
)
# fmt: on
# fmt: off
_TOWER_USED = frozenset(
    [
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "layer_norm_eps", "model_type",
    ]
)
# fmt: on
# Of a tower, projection_dim counts only where the tower is used alone: CLIPModel goes by its own.
_TOWER = _TOWER_USED | _NO_EFFECT | {"projection_dim"}

MODEL_FIELDS = _NO_EFFECT | {
    "model_type",
    "projection_dim",
    "text_config",
    "vision_config",
    "text_config_dict",
    "vision_config_dict",
}
TEXT_FIELDS = _TOWER | {"max_position_embeddings", "vocab_size", "eos_token_id"}
VISION_FIELDS = _TOWER | {"image_size", "patch_size", "num_channels"}

# Of the image processor: names of classes, and how arrays are passed around.
# fmt: off
_PROCESSOR_NO_EFFECT = frozenset(
    [
        "_valid_processor_keys", "auto_map", "data_format", "default_to_square", "device", "disable_grouping",
        "do_convert_rgb", "feature_extractor_type", "image_processor_type", "input_data_format", "processor_class",
        "return_tensors",
    ]
)
# fmt: on


def refuse_unknown(where: str, part: Mapping, known: Collection[str]) -> None:
    """Raises WeightsError if a field that is in no table has a value; empty ones (None, False, {}) ask for nothing."""
    unknown = [
        f"{key}={value!r}"
        for key, value in part.items()
        if key not in known and not (value is None or value is False or value in ({}, []))
    ]
    if unknown:
        raise WeightsError(
            f"{where} has fields that are not known here and may change the numbers: {', '.join(unknown)}"
        )


def side_of(name: str, value: int | list) -> int:
    """The side of a square given as a number or as height and width.

    Raises:
      WeightsError: it is not square, or not a size.
    """
    sides = value if isinstance(value, list | tuple) else [value]
    if isinstance(value, Mapping):
        sides = [value.get("height"), value.get("width")]
    if not all(type(side) is int for side in sides) or len(sides) not in (1, 2):
        raise WeightsError(f"{name}={value!r} is not a size in pixels")
    if len(set(sides)) > 1:
        raise WeightsError(f"{name}={value!r} is not square, and only square images are built here")
    return sides[0]


def check_preprocessing(file: str, content: Mapping, image_size: int, mean: tuple, std: tuple) -> None:
    """Checks an image processor's config, by itself or inside of a ``processor_config.json``.

    Raises:
      WeightsError: images would have to be prepared in another way than CLIP's: the fields are named.
    """
    if file == "processor_config.json":
        content = content.get("image_processor") or content
    processor = {key: value for key, value in content.items() if value is not None}
    wrong = []
    for key, wanted in (("image_mean", mean), ("image_std", std)):
        given = processor.get(key, wanted)
        if len(given) != 3 or any(abs(one - other) > 1e-4 for one, other in zip(given, wanted, strict=True)):
            wrong.append(f"{key}={given} is not {list(wanted)}")
    expected = {
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
        "resample": 3,  # bicubic
        "do_pad": False,
    }
    wrong += [
        f"{key}={processor[key]} is not {value}"
        for key, value in expected.items()
        if processor.get(key, value) != value
    ]
    if abs(processor.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        wrong.append(f"rescale_factor={processor['rescale_factor']} is not 1/255")
    for key in ("size", "crop_size"):
        given = processor.get(key)
        if key == "size" and isinstance(given, Mapping) and given:
            given = given["shortest_edge"] if set(given) == {"shortest_edge"} else f"{dict(given)}"
        if given and (isinstance(given, str) or side_of(f"{file}: {key}", given) != image_size):
            wrong.append(f"{key}={processor[key]} is not the model's {image_size} (of the shortest edge)")
    if wrong:
        raise WeightsError(f"{file} asks for other preprocessing than CLIP's: {'; '.join(wrong)}")
    known = expected.keys() | {"image_mean", "image_std", "rescale_factor", "size", "crop_size"} | _PROCESSOR_NO_EFFECT
    refuse_unknown(file, processor, known)
