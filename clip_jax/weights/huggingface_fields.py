"""Every field of Hugging Face's CLIP configs, and how it is treated here.

A field is used, has no effect on embeddings, or must have the value that is implemented here. A field that is in no
table may change the embeddings. It is refused by name, unless it is empty.

Source: ``CLIPConfig``, ``CLIPTextConfig``, ``CLIPVisionConfig``, ``CLIPImageProcessor`` and ``CLIPTokenizer`` of
transformers 4 and 5, and the configs that OpenAI's published folders have.
"""

from collections.abc import Collection, Mapping

from clip_jax.models.preprocessing import IMAGE_MEAN, IMAGE_STD, MAX_RESIZE, SMALLEST_STD, Preprocessing
from clip_jax.weights.mapping import WeightsError

# Files from before 2023 repeat these in each tower. They control generation, training, logging and output, not CLIP's
# towers. Dropout is one of them: it is off outside of training, and training here has none.
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
# A tower's projection_dim has an effect only if the tower is used alone: CLIPModel uses its own.
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

# Fields of the image processor: names of classes, and how arrays are passed.
# fmt: off
_PROCESSOR_NO_EFFECT = frozenset(
    [
        "_valid_processor_keys", "data_format", "device", "disable_grouping", "do_convert_rgb", "input_data_format",
        "processor_class", "return_tensors",
    ]
)
# fmt: on

PROCESSOR_SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
# Other types have other defaults: SigLIP's and ViT's resize to a square, with a mean of 0.5.
PROCESSOR_TYPES = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
PROCESSOR_TYPE_FIELDS = ("image_processor_type", "feature_extractor_type")
# Each field and the switch that turns it on.
PROCESSOR_NUMBERS = {
    "size": "do_resize",
    "resample": "do_resize",
    "crop_size": "do_center_crop",
    "rescale_factor": "do_rescale",
    "image_mean": "do_normalize",
    "image_std": "do_normalize",
}
PROCESSOR_FIELDS = _PROCESSOR_NO_EFFECT.union(
    PROCESSOR_SWITCHES,
    PROCESSOR_TYPE_FIELDS,
    PROCESSOR_NUMBERS,
    ("do_pad", "default_to_square"),
)
LARGEST_SIDE = 65_536
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers


def refuse_unknown(where: str, part: Mapping, known: Collection[str]) -> None:
    """Raises WeightsError if a field that is in no table has a value other than None, False, {} and []."""
    unknown = [
        f"{key}={value!r}"
        for key, value in part.items()
        if key not in known and not (value is None or value is False or value in ({}, []))
    ]
    if unknown:
        raise WeightsError(
            f"{where} has fields that are not known here and may change the numbers: {', '.join(unknown)}"
        )


def mapping(where: str, value: object) -> Mapping:
    """The value if it is a mapping; an empty mapping for None.

    Raises:
      WeightsError: it is neither.
    """
    if value is not None and not isinstance(value, Mapping):
        raise WeightsError(f"{where}={value!r} is not a mapping of fields")
    return value or {}


def side_of(name: str, value: object) -> int:
    """The side in pixels of a square that is given as a number or as height and width.

    Raises:
      WeightsError: it is not square, or not a size in pixels.
    """
    sides = value if isinstance(value, list | tuple) else [value]
    if isinstance(value, Mapping) and set(value) == {"height", "width"}:
        sides = [value["height"], value["width"]]
    if len(sides) not in (1, 2) or not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides):
        raise WeightsError(f"{name}={value!r} is not a size in pixels")
    if len(set(sides)) > 1:
        raise WeightsError(f"{name}={value!r} is not square, and only square images are built here")
    return sides[0]


def triple(name: str, value: object, positive: bool = False) -> tuple[float, float, float]:
    """One number for each channel, from three numbers or from one for all channels.

    Raises:
      WeightsError: it is neither, or not finite, or not positive although it must be.
    """
    numbers = list(value) if isinstance(value, list | tuple) else [value] * 3
    if len(numbers) != 3 or not all(_is_number(one) and (one >= SMALLEST_STD or not positive) for one in numbers):
        raise WeightsError(f"{name}={value!r} is not three {'positive ' * positive}numbers, of red, green and blue")
    return tuple(map(float, numbers))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def read_preprocessing(file: str, content: Mapping, image_size: int) -> Preprocessing | None:
    """The preprocessing in an image processor's config or in a ``processor_config.json``; None if it has none.

    Missing fields have the defaults of ``CLIPImageProcessor``.

    Raises:
      WeightsError: the preprocessing is not implemented here; the message names the fields.
    """
    if content.get("image_processor") is not None:
        content = mapping(f"{file}: image_processor", content["image_processor"])
    elif not content.keys() & (PROCESSOR_FIELDS - {"processor_class"}) and file == "processor_config.json":
        return None  # the image processor is in preprocessor_config.json
    empty = [name for name in content.keys() & PROCESSOR_NUMBERS if content[name] is None]
    processor = {key: value for key, value in content.items() if value is not None}
    switches = {name: processor.get(name, True) for name in PROCESSOR_SWITCHES}
    wrong = [f"{name}={value!r} is not true or false" for name, value in switches.items() if type(value) is not bool]
    wrong += [
        f"{name}={processor[name]!r} is not CLIP's"
        for name in PROCESSOR_TYPE_FIELDS
        if name in processor and processor[name] not in PROCESSOR_TYPES
    ]
    wrong += [f"{name}=None is no value" for name in sorted(empty) if switches[PROCESSOR_NUMBERS[name]]]
    if not switches["do_resize"]:
        wrong.append("do_resize=False is not supported")
    if processor.get("do_pad", False) is not False:
        wrong.append(f"do_pad={processor['do_pad']!r} is not supported")
    resample = processor.get("resample", 3)
    if type(resample) is not int or resample not in RESAMPLE:
        wrong.append(f"resample={resample!r} is not one of Pillow's numbers {', '.join(map(str, RESAMPLE))}")
    factor = processor.get("rescale_factor", 1 / 255)
    if not _is_number(factor) or factor < SMALLEST_STD:
        wrong.append(f"rescale_factor={factor!r} is not a positive number")
    if wrong:
        raise WeightsError(f"{file}: {'; '.join(wrong)}")
    refuse_unknown(file, processor, PROCESSOR_FIELDS)
    mean = triple(f"{file}: image_mean", processor.get("image_mean", IMAGE_MEAN))
    std = triple(f"{file}: image_std", processor.get("image_std", IMAGE_STD), positive=True)
    if not switches["do_normalize"]:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    # Their mean and deviation are for pixels times a factor; ours are for pixels in [0, 1].
    scale = 255 * (factor if switches["do_rescale"] else 1)
    if abs(scale - 1) > 1e-6:
        mean, std = (tuple(value / scale for value in values) for values in (mean, std))
    resize_mode, resize_size = _resizing(
        file, processor.get("size", {"shortest_edge": 224}), processor.get("default_to_square", False)
    )
    crop_size = resize_size if resize_mode == "squash" else None
    if switches["do_center_crop"]:
        crop_size = side_of(f"{file}: crop_size", processor.get("crop_size", 224))
    if crop_size is None:
        raise WeightsError(f"{file}: do_center_crop=False leaves images that are not square, which are not built here")
    if crop_size != image_size:
        key = "crop_size" if switches["do_center_crop"] else "size"
        given = f"{key}={processor[key]!r}" if key in processor else f"it has no {key}, and the default of 224"
        raise WeightsError(f"{file}: {given} is not the model's {image_size}")
    if resize_size > MAX_RESIZE * image_size:
        raise WeightsError(f"{file}: size={resize_size} is over {MAX_RESIZE} times the model's {image_size}")
    return Preprocessing(mean, std, resize_mode, RESAMPLE[resample], 0 if resize_size == image_size else resize_size)


def _resizing(file: str, size: object, default_to_square: object) -> tuple[str, int]:
    """The resize mode and size, read as ``convert_to_size_dict`` of transformers does.

    A number is the length of the short side, as in files from before 2022, or with ``default_to_square`` of both.
    """
    if default_to_square not in (True, False):
        raise WeightsError(f"{file}: default_to_square={default_to_square!r} is not true or false")
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        if type(size["shortest_edge"]) is not int:
            raise WeightsError(f"{file}: size.shortest_edge={size['shortest_edge']!r} is not a size in pixels")
        return "shortest", side_of(f"{file}: size.shortest_edge", size["shortest_edge"])
    if isinstance(size, Mapping) and set(size) != {"height", "width"}:
        raise WeightsError(f"{file}: size={dict(size)} is not supported, only shortest_edge, or height and width")
    squash = default_to_square or isinstance(size, Mapping | list)
    return "squash" if squash else "shortest", side_of(f"{file}: size", size)


def preprocessing_config(preprocessing: Preprocessing, image_size: int) -> dict:
    """The ``preprocessor_config.json`` of a ``CLIPImageProcessor``.

    Raises:
      WeightsError: ``CLIPImageProcessor`` cannot pad images as this model needs it.
    """
    if preprocessing.resize_mode == "longest":
        raise WeightsError(
            "Hugging Face's CLIP cannot resize images by their long side and pad them; write the model --to=open_clip "
            "or clip_jax"
        )
    size = preprocessing.resize_size or image_size
    if size < image_size and preprocessing.fill_color:
        raise WeightsError("Hugging Face's CLIP pads images with black alone; write the model --to=clip_jax")
    squash = preprocessing.resize_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size} if squash else {"shortest_edge": size},
        "resample": next(number for number, name in RESAMPLE.items() if name == preprocessing.interpolation),
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
