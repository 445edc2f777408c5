"""A trained model at another image size: its image tower's positions are resized, and nothing else changes."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from clip_jax.models.positions import resize_positions
from clip_jax.models.presets import RESNET_REDUCTION, CLIPPreset, ResNetPreset
from clip_jax.weights.mapping import WeightsError


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
        positions = _resized(pool["positional_embedding"], side)
        vision = vision | {"attention_pool": pool | {"positional_embedding": positions}}
    else:
        side = wanted.vision.image_size // wanted.vision.patch_size
        vision = vision | {"positional_embedding": _resized(vision["positional_embedding"], side)}
    return variables | {"params": params | {"vision": vision}}


def _resized(positions: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(resize_positions(jnp.asarray(positions), side))


def _fields(preset: CLIPPreset) -> dict[str, object]:
    towers = {"vision": dataclasses.asdict(preset.vision), "text": dataclasses.asdict(preset.text)}
    nested = {f"{tower}.{name}": value for tower, fields in towers.items() for name, value in fields.items()}
    return {"embed_dim": preset.embed_dim, **nested}
