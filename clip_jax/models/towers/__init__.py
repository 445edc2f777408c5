"""The registry of image towers and text towers (CLIP's two encoders). docs/design.md shows how to add a tower."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from clip_jax.models.towers.base import ImageTower, TextTower, Tower
from clip_jax.models.towers.resnet import ResNetPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.models.towers.vision_transformer import VisionTransformerPreset

IMAGE_TOWERS: dict[str, type[ImageTower]] = {tower.name: tower for tower in (VisionTransformerPreset, ResNetPreset)}
TEXT_TOWERS: dict[str, type[TextTower]] = {tower.name: tower for tower in (TextTransformerPreset,)}
T = TypeVar("T", bound=Tower)


def tower_from_dict(section: Mapping[str, Any], towers: Mapping[str, type[T]], where: str) -> T:
    """Returns the description of the tower whose fields are the keys of a config's section.

    Fields with a default may be missing, as in older configs.

    Args:
      section: values by field, also as read from JSON.
      towers: one of the two registries.
      where: the section's name.

    Raises:
      ValueError: the keys are the fields of no tower, or of several.
    """
    fitting = {}
    for name, tower in towers.items():
        fields = {field.name: field for field in dataclasses.fields(tower)}
        required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        if required <= section.keys() <= fields.keys():
            fitting[name] = len(fields)
    if len(fitting) > 1:  # only those whose fields are all in the section
        fitting = {name: size for name, size in fitting.items() if size == len(section)}
    if len(fitting) != 1:
        known = "; ".join(
            f"{name} ({', '.join(field.name for field in dataclasses.fields(tower))})" for name, tower in towers.items()
        )
        raise ValueError(f"{where} has the fields {', '.join(section)}, of no one tower; the towers are {known}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}
    return towers[next(iter(fitting))](**values)
