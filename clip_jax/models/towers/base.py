"""What the description of a tower states, so that no other module has to ask which tower it is.

A description is a frozen dataclass. Its fields are the section ``config.model.vision`` or ``config.model.text``, and
are saved with a run: a tower is recognized by their names. Fields of type int must be positive.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Protocol, Self

import flax.linen as nn

from clip_jax.models.execution import Execution


class ShapeError(ValueError):
    """The shapes of a file's tensors fit no such tower; the message is one line."""


class Shapes(Protocol):
    """The tensors of a file of weights, by the paths that a tower's parameters have, such as ``projection.kernel``."""

    def shape(self, path: str) -> tuple[int, ...]:
        """The shape of this parameter, without the axis of layers."""

    def count(self, path: str, number: str, **others: int) -> int:
        """One more than the highest ``number`` (see :meth:`Tower.numbers`) that the parameter has in the file."""


def side_of_grid(num_positions: int) -> int:
    """n, of the 1 + n * n positions of an image tower.

    Raises:
      ShapeError: there is no such number.
    """
    if num_positions < 2:
        raise ShapeError("the image tower has no positions")
    side = math.isqrt(num_positions - 1)
    if side**2 != num_positions - 1:
        raise ShapeError(f"{num_positions - 1} positions of the image tower do not make a square")
    return side


class Tower(abc.ABC):
    """What both kinds of towers state. Everything but ``name`` and ``build`` has a default.

    Attributes:
      name: in the registry and in the tables of weights.
      section: of ``config.model``, and the name of the tower's module in :class:`clip_jax.models.clip.CLIP`.
      activation: of its MLPs, where a description has such a field. Files of weights do not state it.
      training_fields: fields that change how the tower trains, and not the model that results.
      fused_head_widths: of the attention layers that cuDNN may compute.
    """

    name: ClassVar[str]
    section: ClassVar[str]
    activation = None
    training_fields: ClassVar[tuple[str, ...]] = ()
    fused_head_widths: tuple[float, ...] = ()

    @property
    def title(self) -> str:
        """The tower in words, for a person."""
        return self.name.replace("_", " ")

    @abc.abstractmethod
    def build(self, embed_dim: int, execution: Execution) -> nn.Module:
        """Returns the module. What it takes is stated by the two subclasses."""

    def problems(self, prefix: str) -> list[str]:
        """Returns what is wrong with these values, a line for each; ``prefix`` is the config section's name."""
        return []

    def numbers(self) -> tuple[dict[str, int | range], ...]:
        """The numbers that names of its parameters may contain, as groups of ``{"layer": range(12)}``.

        A parameter of ours whose path has a ``{number}`` exists once for each group. One whose name elsewhere has a
        number with a range is one array here, stacked along its first axis.
        """
        return ({},)

    @classmethod
    def from_shapes(cls, shapes: Shapes, activation: str) -> Self:
        """Returns the description of a file's tensors, of which no config tells more.

        Raises:
          ShapeError: the shapes are of no such tower, or leave something open.
        """
        raise ShapeError(
            f"which {cls.name} it is cannot be seen from the tensors; put the model's config beside the file"
        )

    def as_published(self) -> Self:
        """The same with its activation and its training fields at their defaults, as in a preset."""
        names = ("activation", *self.training_fields)
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in names}
        return dataclasses.replace(self, **defaults)


class ImageTower(Tower):
    """Images to features. ``build`` returns a module named "vision" that is called with ``(images, train)``.

    It maps normalized images ``[B, S, S, 3]`` and whether this is training to features ``[B, embed_dim]`` in
    ``execution.dtype``, not of unit length. S is any multiple of ``side_unit``. With ``num_patches`` it also takes
    ``kept_patches``: int32 ``[B, K]``, the patches to compute.

    Attributes:
      image_size: S, in pixels. All descriptions have this field.
      side_unit: what S must be a multiple of.
      positions: the path of the parameter ``[1 + n * n, W]`` that is resized for images of another size, where n is
        ``grid_side(S)``. Empty: there is none, and the parameters fit images of any size.
      feature_layer: the name of the module whose output a linear probe reads: the last before the projection into the
        shared space, or "vision", the tower itself.
      optimizer_defaults: of ``config.optimizer``, where they depend on the tower.
    """

    section = "vision"
    image_size: int
    side_unit: int = 1
    positions: ClassVar[tuple[str, ...]] = ()
    feature_layer: ClassVar[str] = "vision"
    optimizer_defaults: ClassVar[dict[str, Any]] = {"beta2": 0.98, "epsilon": 1e-6}  # tables 19 and 20 of the paper

    def grid_side(self, image_size: int) -> int:
        """Positions along each side of an image of this size."""
        return image_size // self.side_unit

    def num_patches(self, image_size: int) -> int | None:
        """Patches of an image of this size, some of which training may leave out; None: it has none to leave out."""
        return None

    @abc.abstractmethod
    def flops(self, embed_dim: int, patch_dropout: float) -> int:
        """Flops of one image, forward and backward: see :mod:`clip_jax.planning.model_flops`."""


class TextTower(Tower):
    """Texts to features. ``build`` returns a module named "text" that is called with ``(tokens,)``.

    It maps int32 ``[B, L]`` to features ``[B, embed_dim]`` in ``execution.dtype``, not of unit length. Positions after
    the end of a text, which has the highest id of the vocabulary, must not change its feature: they are cut off.

    Attributes:
      context_length: the largest L. All descriptions have this field.
      vocab_size: token ids are below it. All descriptions have this field.
      projection: the path of the parameter whose last axis is ``embed_dim``.
    """

    section = "text"
    context_length: int
    vocab_size: int
    projection: ClassVar[str] = "projection.kernel"

    @abc.abstractmethod
    def flops(self, embed_dim: int) -> int:
        """Flops of one text, forward and backward: see :mod:`clip_jax.planning.model_flops`."""
