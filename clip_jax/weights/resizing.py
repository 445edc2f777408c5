"""Changes the image size of a trained model: resizes the image tower's positional embedding and nothing else."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from clip_jax.models.positions import resize_positions
from clip_jax.models.presets import CLIPPreset
from clip_jax.weights.mapping import WeightsError


def at_image_size(variables: dict, preset: CLIPPreset, wanted: CLIPPreset) -> dict:
    """The variables of ``preset`` for ``wanted``, which may differ in its image size and its training fields.

    The size that images are resized to before the crop must change in proportion to the image size.

    Raises:
      WeightsError: they differ in more; the message names the fields, and for the preprocessing the flags to set.
    """
    free = ("vision.image_size", *(f"vision.{name}" for name in wanted.vision.training_fields))
    resized = preset.preprocessing.at_image_size(preset.vision.image_size, wanted.vision.image_size)
    there, here = _fields(dataclasses.replace(preset, preprocessing=resized)), _fields(wanted)
    differing = [
        f"{name} is {there.get(name)} there and {here.get(name)} here"
        for name in {**there, **here}
        if name not in free and there.get(name) != here.get(name)
    ]
    settings = [
        f"--config.model.{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in there.items()
        if name.startswith("preprocessing.") and name not in free and here[name] != value
    ]
    if settings and len(settings) == len(differing):
        raise WeightsError(f"the model to start from has images prepared in another way; set {' '.join(settings)}")
    if differing:
        raise WeightsError(f"the model to start from is another one: {'; '.join(differing)}")
    if preset.vision.image_size == wanted.vision.image_size or not wanted.vision.positions:
        return variables
    side = wanted.vision.grid_side(wanted.vision.image_size)
    return _with_positions(variables, ("params", "vision", *wanted.vision.positions), side)


def _with_positions(variables: dict, path: Sequence[str], side: int) -> dict:
    """A copy in which the leaf at this path is resized to ``side`` by ``side`` positions."""
    key, *rest = path
    if rest:
        return variables | {key: _with_positions(variables[key], rest, side)}
    return variables | {key: np.asarray(resize_positions(jnp.asarray(variables[key]), side))}


def _fields(preset: CLIPPreset) -> dict[str, object]:
    parts = {name: value for name, value in dataclasses.asdict(preset).items() if isinstance(value, dict)}
    nested = {f"{part}.{name}": value for part, fields in parts.items() for name, value in fields.items()}
    return {"embed_dim": preset.embed_dim, **nested}
