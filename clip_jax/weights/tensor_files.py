"""Reads tensors by name from files of weights: safetensors, PyTorch's, and shards of either."""

import json
import pathlib
import re
from collections.abc import Collection, Mapping

import ml_dtypes
import numpy as np
import safetensors

from clip_jax.weights.mapping import SHOWN_NAMES, Tensors, WeightsError
from clip_jax.weights.torch_file import read_torch_file

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
INDEX_NAME = re.compile(r"(.+)\.index(?:\.\w+)?\.json")  # the second part is a variant, such as fp16
SHARD_NAME = re.compile(r".+-\d{5}-of-\d{5}\.\w+")
# Prefixes of DistributedDataParallel and torch.compile, which wrap a whole model or one of its towers.
WRAPPER = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")
HOLDERS = ("model.", "clip.")  # attributes in which other modules keep the model
LOSS_PARAMETERS = {"logit_scale", "logit_bias"}  # the module that has both towers may have these, too
SAFETENSORS_DTYPES = {
    "F64": np.dtype("f8"),
    "F32": np.dtype("f4"),
    "F16": np.dtype("f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("i8"),
    "I32": np.dtype("i4"),
    "I16": np.dtype("i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read_tensors(file: pathlib.Path) -> tuple[Tensors, dict[str, str]]:
    """Returns the tensors of a file or of the shards that an index lists, and the metadata of a safetensors file.

    The names do not have the prefixes of wrappers.

    Raises:
      WeightsError, TorchFileError: a file is damaged, has the wrong ending, or has tensors of an unsupported dtype.
    """
    if is_index(file):
        return without_wrappers(_read_shards(file)), {}
    tensors, metadata = _read_one(file)
    return without_wrappers(tensors), metadata


def is_index(file: pathlib.Path) -> bool:
    """Whether a file's name is that of an index of shards, such as ``model.safetensors.index.json``."""
    return INDEX_NAME.fullmatch(file.name) is not None


def without_wrappers(tensors: Tensors) -> dict[str, np.ndarray]:
    """Removes the prefixes of wrappers from all names, and the prefixes of holders if all names share them.

    Raises:
      WeightsError: two tensors would get the same name.
    """
    names = {name: WRAPPER.sub(r"\1", name) for name in tensors}
    while prefix := _shared_holder(set(names.values()) - LOSS_PARAMETERS):
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
    result = {short: tensors[name] for name, short in names.items()}
    if len(result) < len(names):
        raise WeightsError("it holds tensors with and without a wrapper's prefix, such as _orig_mod.; save one of them")
    return result


def _shared_holder(names: Collection[str]) -> str | None:
    return next((prefix for prefix in HOLDERS if names and all(name.startswith(prefix) for name in names)), None)


def _read_one(file: pathlib.Path) -> tuple[Tensors, dict[str, str]]:
    if file.suffix != ".safetensors":
        return read_torch_file(file), {}
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            dtypes = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        if other := sorted(dtypes - SAFETENSORS_DTYPES.keys()):
            raise WeightsError(
                f"it holds tensors of {', '.join(other)}, which are not read here; save the model in float32, float16 "
                "or bfloat16"
            )
        views = safetensors.deserialize(file.read_bytes())
    except safetensors.SafetensorError as error:
        raise WeightsError(f"not a whole safetensors file ({error}); download or copy it again") from None
    return {
        name: np.frombuffer(view["data"], SAFETENSORS_DTYPES[view["dtype"]]).reshape(view["shape"])
        for name, view in views
    }, metadata


def _read_shards(index: pathlib.Path) -> dict[str, np.ndarray]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, Mapping) or not all(isinstance(shard, str) for shard in listed.values()) or not listed:
        raise WeightsError(f"{index} is not an index of shards: it has no weight_map of names to files")
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(listed.values())):
        file = index.parent / shard
        if pathlib.PurePath(shard).name != shard:
            raise WeightsError(f"{index} names {shard!r}, which is not a file of its folder")
        if not file.is_file():
            raise WeightsError(f"{index} names the shard {shard}, which is not there; download or copy it too")
        try:
            found, _ = _read_one(file)
        except WeightsError as error:
            raise WeightsError(f"{file}: {error}") from None
        expected = {name for name, owner in listed.items() if owner == shard}
        if other := sorted(expected ^ found.keys()):
            shown = ", ".join(other[:SHOWN_NAMES]) + (" and more" if len(other) > SHOWN_NAMES else "")
            raise WeightsError(f"{shard} and {index.name} differ in {shown}; download or copy both again")
        tensors |= found
    beginning = INDEX_NAME.fullmatch(index.name)[1].partition(".")[0]
    for file in sorted(index.parent.glob(f"{beginning}-*")):
        if SHARD_NAME.fullmatch(file.name) and file.name not in listed.values():
            raise WeightsError(f"{index} does not name the shard {file.name} of its folder; remove one of the two")
    return tensors


def read_json(file: pathlib.Path) -> dict:
    """Reads a JSON file that contains an object.

    Raises:
      WeightsError: it is not JSON, or does not contain an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{file} is not a config: it holds a {type(content).__name__}")
    return content
