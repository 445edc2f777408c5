"""A trained model at another image size: its image tower's positions are resized, and nothing else changes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.models.presets import RESNET_REDUCTION, CLIPPreset, ResNetPreset
from clip_jax.weights.mapping import WeightsError


def resize_positions(positions: np.ndarray, side: int) -> np.ndarray:
    """Positions ``[1 + n * n, W]`` to ``[1 + side * side, W]``, in their dtype; the first, which has no place, is kept.

    Bicubic with antialiasing and without aligned corners, as open_clip's ``resize_pos_embed`` does (its ``model.py``).
    """
    first, grid = positions[:1], positions[1:]
    before, width = math.isqrt(len(grid)), positions.shape[1]
    grid = jnp.asarray(grid, jnp.float32).reshape(before, before, width)
    resized = jax.image.resize(grid, (side, side, width), "cubic", antialias=True)
    return np.concatenate([first, np.asarray(resized.reshape(-1, width), positions.dtype)])


def at_image_size(variables: dict, preset: CLIPPreset, wanted: CLIPPreset) -> dict:
    """The variables of ``preset`` for ``wanted``, which may differ in its image size and in how BatchNorm trains.

    Raises:
      WeightsError: it differs in more; the fields are named.
    """
    free = ("vision.image_size", "vision.batch_norm")
    there, here = _fields(preset), _fields(wanted)
    differing = [
        f"{name} is {there.get(name)} there and {here.get(name)} here"
        for name in {**there, **here}
        if name not in free and there.get(name) != here.get(name)
    ]
    if differing:
        raise WeightsError(f"the model to start from is another one: {'; '.join(differing)}")
    if preset.vision.image_size == wanted.vision.image_size:
        return variables
    params, vision = variables["params"], variables["params"]["vision"]
    if isinstance(wanted.vision, ResNetPreset):
        side, pool = wanted.vision.image_size // RESNET_REDUCTION, vision["attention_pool"]
        positions = resize_positions(pool["positional_embedding"], side)
        vision = vision | {"attention_pool": pool | {"positional_embedding": positions}}
    else:
        side = wanted.vision.image_size // wanted.vision.patch_size
        vision = vision | {"positional_embedding": resize_positions(vision["positional_embedding"], side)}
    return variables | {"params": params | {"vision": vision}}


def _fields(preset: CLIPPreset) -> dict[str, object]:
    towers = {"vision": dataclasses.asdict(preset.vision), "text": dataclasses.asdict(preset.text)}
    nested = {f"{tower}.{name}": value for tower, fields in towers.items() for name, value in fields.items()}
    return {"embed_dim": preset.embed_dim, **nested}
