"""Reads and writes weights as OpenAI's, open_clip's and Hugging Face's files or as a run's folder, without changes."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import numpy as np

from clip_jax.files import atomic_path
from clip_jax.models.preprocessing import Preprocessing
from clip_jax.models.presets import PRESETS, CLIPPreset, preset_from_dict
from clip_jax.weights import huggingface, huggingface_tokenizer, open_clip, openai
from clip_jax.weights.huggingface_tokenizer import check_tokenizer
from clip_jax.weights.mapping import Tensors, WeightsError, preset_from_shapes, to_variables
from clip_jax.weights.tensor_files import SHARD_NAME, SUFFIXES, is_index, read_json, read_tensors
from clip_jax.weights.torch_file import TorchFileError

__all__ = ["FORMATS", "Weights", "WeightsError", "preset_name", "read_weights", "write_weights"]

UNREAD_SUFFIXES = (".json", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz")
NO_EFFECT_FILES = ("generation_config.json", "training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt")
PREPROCESSING_NOTE = (
    "{} does not state how images are prepared: taken as OpenAI's way; for a model with another mean, deviation or way "
    "of resizing, put its preprocessor_config.json and config.json, or its open_clip_config.json, next to it"
)
TABLES = {"open_clip": open_clip.TABLE, "huggingface": huggingface.TABLE, "openai": openai.TABLE}
FORMATS = ("clip_jax", *TABLES)


class Weights(NamedTuple):
    """A model as numpy arrays: ``variables`` has ``params`` and ``batch_stats``, in the dtypes of the file.

    ``format`` names the format they came from. ``note`` states what was assumed or not read, or is empty.
    """

    preset: CLIPPreset
    variables: dict
    format: str
    note: str = ""


def preset_name(preset: CLIPPreset) -> str:
    """Its name in :data:`clip_jax.models.presets.PRESETS`, with " with gelu" added if it has that, or "custom"."""
    published = CLIPPreset(preset.embed_dim, preset.vision.as_published(), preset.text.as_published())
    name = next((name for name, known in PRESETS.items() if known == published), "custom")
    plain = {tower.activation for tower in (preset.vision, preset.text)} <= {"gelu", None}
    return f"{name} with gelu" if plain and name != "custom" else name


def digest_of(variables: dict) -> str:
    """A digest that distinguishes one set of weights from another; ``variables`` are arrays by name."""
    result = hashlib.sha256()
    for leaf in jax.tree.leaves(variables):
        result.update(np.ascontiguousarray(leaf).data)
    return result.hexdigest()


def read_weights(
    path: str | os.PathLike,
    activation: str | None = None,
    assumed_activation: str = "quick_gelu",
    assumed_preprocessing: Preprocessing | None = None,
) -> Weights:
    """Reads a model from a file or folder of any known format, recognized by its content.

    A file without a config in its folder does not state its activation. It is then ``activation``, or
    ``assumed_activation`` if that is None; OpenAI's is "quick_gelu". Nor does it state its preprocessing. That is then
    ``assumed_preprocessing``, or OpenAI's if that is None. ``note`` states what was assumed.

    Raises:
      FileNotFoundError: the path does not exist, or the folder has no model.
      WeightsError: it is damaged, unsafe, or not a model that is implemented here; or its config states another
        activation than ``activation``.
    """
    source = pathlib.Path(path).expanduser()
    if not source.exists():
        raise FileNotFoundError(f"{source}: there is no such file or folder")
    if not (source.is_file() or source.is_dir()):  # reading a pipe would block
        raise WeightsError(f"{source}: a pipe or a device, not a file or folder of weights")
    try:
        weights = _read_folder(source) if source.is_dir() else _read_file(source, activation, assumed_activation)
        if weights.preset.preprocessing is None:
            preset = dataclasses.replace(weights.preset, preprocessing=assumed_preprocessing or Preprocessing())
            note = "" if assumed_preprocessing else PREPROCESSING_NOTE.format(source.name)
            weights = weights._replace(preset=preset, note="; ".join(filter(None, (weights.note, note))))
        _check_activation(weights.preset, activation)
        return weights
    except (WeightsError, TorchFileError) as error:
        where = str(error).startswith(str(source))
        raise WeightsError(str(error) if where else f"{source}: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise WeightsError(f"{source}: its config or its tensors make no sense ({reason})") from error


def _check_activation(preset: CLIPPreset, given: str | None) -> None:
    for name, tower in (("image", preset.vision), ("text", preset.text)):
        stated = tower.activation  # None for a tower without a choice, such as a ResNet
        if given is not None and stated not in (given, None):
            raise WeightsError(
                f"activation={given!r} contradicts the model's config, by which its {name} tower has {stated!r}; leave "
                "--activation away, or correct the config"
            )


def _read_folder(folder: pathlib.Path) -> Weights:
    config_file = folder / huggingface.CONFIG_FILE  # a run has one, too
    config = read_json(config_file) if config_file.is_file() else {}
    if (folder / "checkpoints").is_dir() and "model" in config:
        return _read_run(folder, config)
    for config_name, names in (
        (open_clip.CONFIG_FILE, open_clip.WEIGHT_FILES),
        (huggingface.CONFIG_FILE, huggingface.WEIGHT_FILES),
    ):
        if (folder / config_name).is_file():
            file = _weight_file(folder, names)
            if file is not None:
                return _read_configured(file, config_name)
            if not (config_name == open_clip.CONFIG_FILE and config_file.is_file()):
                raise WeightsError(f"{folder} has {config_name} but no weights: none of {', '.join(names)}")
    raise FileNotFoundError(
        f"{folder} holds no model: neither a run (config.json and checkpoints/), nor {open_clip.CONFIG_FILE}, "
        f"nor Hugging Face's config.json"
    )


def _weight_file(folder: pathlib.Path, names: Sequence[str]) -> pathlib.Path | None:
    """The first of these files, or its index of shards; otherwise the only other weights file, such as a variant."""
    usual = (folder / candidate for name in names for candidate in (name, f"{name}.index.json"))
    if (file := next((file for file in usual if file.is_file()), None)) is not None:
        return file
    beginnings = {name.partition(".")[0] for name in names}
    others = [
        file
        for file in sorted(folder.iterdir())
        if file.name.partition(".")[0] in beginnings and (file.suffix in SUFFIXES or is_index(file))
    ]
    if len(others) > 1:
        raise WeightsError(f"{folder} has several files of weights; name one: {', '.join(f.name for f in others)}")
    return others[0] if others else None


def _read_run(folder: pathlib.Path, config: dict) -> Weights:
    # Imported here because orbax takes a second to import, and only runs need it.
    from etils import epath

    from clip_jax.run_folder import restore_variables

    return Weights(preset_from_dict(config["model"]), restore_variables(epath.Path(folder)), "clip_jax")


def _read_file(file: pathlib.Path, activation: str | None, assumed_activation: str) -> Weights:
    if SHARD_NAME.fullmatch(file.name):
        raise WeightsError("one shard of several; name the folder, or its index, such as model.safetensors.index.json")
    tensors, metadata = read_tensors(file)
    named_by_huggingface = "text_model.final_layer_norm.weight" in tensors
    config_name = huggingface.CONFIG_FILE if named_by_huggingface else open_clip.CONFIG_FILE
    if (file.parent / config_name).is_file():
        return _with_config(file, config_name, tensors)
    if open_clip.CONFIG_FILE in metadata:
        preset = open_clip.read_config(json.loads(metadata[open_clip.CONFIG_FILE]))
        return Weights(preset, to_variables(tensors, open_clip.TABLE, preset), open_clip.TABLE.format)
    openai_names = open_clip.TABLE if "logit_bias" in tensors else openai.TABLE  # OpenAI's models have none
    table = huggingface.TABLE if named_by_huggingface else openai_names
    preset = preset_from_shapes(tensors, table, activation or assumed_activation)
    published = "input_resolution" in tensors  # only OpenAI's archives have it
    note = ""
    if activation is None and not published:
        note = (
            f"{file.name} does not tell its activation: taken as OpenAI's quick_gelu; if the model has the plain one, "
            f'as most of open_clip\'s, say --activation=gelu (activation="gelu" in Python)'
        )
    if not published:
        heads = f"{file.name} does not state its attention heads: taken as in published models of its size"
        note = f"{note}; {heads}" if note else heads
        preset = dataclasses.replace(preset, preprocessing=None)  # not known
    return Weights(preset, to_variables(tensors, table, preset), table.format, note)


def _read_configured(file: pathlib.Path, config_name: str) -> Weights:
    tensors, _ = read_tensors(file)
    return _with_config(file, config_name, tensors)


def _with_config(file: pathlib.Path, config_name: str, tensors: Tensors) -> Weights:
    """The model of a file's tensors and of the config in its folder."""
    config = read_json(file.parent / config_name)
    notes: list[str] = []
    read = {
        file.name,
        config_name,
        huggingface.CONFIG_FILE,
        *huggingface.PREPROCESSOR_FILES,
        *huggingface_tokenizer.FILES,
    }
    if config_name == open_clip.CONFIG_FILE:
        table, preset = open_clip.TABLE, open_clip.read_config(config)
    else:
        table, preset = huggingface.TABLE, huggingface.read_config(config)
        preprocessing = huggingface.read_preprocessing(file.parent, preset.vision.image_size)
        preset = dataclasses.replace(preset, preprocessing=preprocessing)
        notes = check_tokenizer(file.parent, preset.text.vocab_size, preset.text.context_length)
    notes.append(_not_read(file, read))
    return Weights(preset, to_variables(tensors, table, preset), table.format, "; ".join(filter(None, notes)))


def _not_read(file: pathlib.Path, read: Collection[str]) -> str:
    """Names the other files in a model's folder that seem to belong to the model; empty if there are none."""
    shards = set(read_json(file)["weight_map"].values()) if is_index(file) else set()
    others = [
        other.name
        for other in sorted(file.parent.iterdir())
        if other.suffix in (*SUFFIXES, *UNREAD_SUFFIXES) and other.name not in {*read, *shards, *NO_EFFECT_FILES}
    ]
    return f"the model is that of {file.name}; not read: {', '.join(others)}" if others else ""


def write_weights(weights: Weights, destination: str | os.PathLike, format: str) -> None:  # noqa: A002
    """Writes a model so that the format's program loads it without a flag. After an error, there is no ``destination``.

    ``format`` is one of :data:`FORMATS`. "open_clip" writes a folder, or a single file if ``destination`` ends in
    ``.safetensors``; "huggingface" and "clip_jax" a folder; "openai" a ``.pt``. Tensors keep their dtypes.

    Raises:
      FileExistsError: ``destination`` exists.
      WeightsError: the format has no such model, or ``destination`` has the wrong ending for the format.
    """
    target = pathlib.Path(destination).expanduser()
    single_file = format == "openai" or (format == "open_clip" and target.suffix == ".safetensors")
    if format not in FORMATS:
        raise WeightsError(f"{format!r} is not a format; the formats are {', '.join(FORMATS)}")
    if format == "openai" and target.suffix != ".pt":
        raise WeightsError(f"{target}: OpenAI's program reads files that end in .pt")
    if not single_file and target.suffix in (".pt", ".bin", ".safetensors"):
        raise WeightsError(f"{target}: {format} weights are a folder; leave {target.suffix} away")
    if format in TABLES and not TABLES[format].has(weights.preset):
        possible = ["clip_jax", *(name for name, table in TABLES.items() if table.has(weights.preset))]
        title = weights.preset.vision.title
        raise WeightsError(f"{format} has no {title}, or not with this text tower; write --to={' or '.join(possible)}")
    if target.exists():
        raise FileExistsError(f"{target} is there already; choose another name")
    nearest = next(folder for folder in target.absolute().parents if folder.exists())
    with atomic_path(target, folder=nearest) as unfinished:
        if not single_file:
            unfinished.mkdir()
        variables, preset = weights.variables, weights.preset
        if format == "openai":
            openai.write(unfinished, variables, preset)
        elif format == "huggingface":
            huggingface.write_folder(unfinished, variables, preset)
        elif single_file:
            open_clip.write_file(unfinished, variables, preset)
        elif format == "open_clip":
            open_clip.write_folder(unfinished, variables, preset)
        else:
            _write_clip_jax(unfinished, weights)
        target.parent.mkdir(parents=True, exist_ok=True)


def _write_clip_jax(folder: pathlib.Path, weights: Weights) -> None:
    from etils import epath

    from clip_jax.run_folder import save_variables, write_config

    model = dataclasses.asdict(weights.preset) | {"name": preset_name(weights.preset)}
    write_config(epath.Path(folder), json.dumps({"converted_from": weights.format, "model": model}, indent=2) + "\n")
    save_variables(epath.Path(folder), weights.variables)
