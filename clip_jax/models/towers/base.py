"""The interface of image and text towers: a tower's config fields, checks, flops and Flax module.

Other modules use only this interface.

A description is a frozen dataclass. Its fields are the keys of ``config.model.vision`` or ``config.model.text``, and
are saved with a run: the names of the fields identify the tower. Fields of type int must be positive.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Protocol, Self

import flax.linen as nn

from clip_jax.models.execution import Execution


class ShapeError(ValueError):
    """The shapes of a file's tensors do not fit this tower; the message is one line."""


class Shapes(Protocol):
    """The shapes in a file of weights, by the paths of a tower's parameters, such as ``projection.kernel``."""

    def shape(self, path: str) -> tuple[int, ...]:
        """Returns the shape of this parameter, without the axis of layers."""

    def count(self, path: str, number: str, **others: int) -> int:
        """Returns one more than the highest ``number`` (see :meth:`Tower.numbers`) of the parameter in the file."""


def side_of_grid(num_positions: int) -> int:
    """Returns n for an image tower with 1 + n * n positions.

    Raises:
      ShapeError: ``num_positions`` is not 1 + n * n for any n above 0.
    """
    if num_positions < 2:
        raise ShapeError("the image tower has no positions")
    side = math.isqrt(num_positions - 1)
    if side**2 != num_positions - 1:
        raise ShapeError(f"{num_positions - 1} positions of the image tower do not make a square")
    return side


class Tower(abc.ABC):
    """The interface of image and text towers. Everything but ``name`` and ``build`` has a default.

    Attributes:
      name: of the tower in the registry and in the tables of weights.
      section: of ``config.model``, and the name of the tower's module in :class:`clip_jax.models.clip.CLIP`.
      activation: of its MLPs, if the description has this field. Files of weights do not contain it.
      training_fields: fields that change the training of the tower, but not the resulting model.
      fused_head_widths: head widths of the attention layers that cuDNN may compute.
    """

    name: ClassVar[str]
    section: ClassVar[str]
    activation = None
    training_fields: ClassVar[tuple[str, ...]] = ()
    fused_head_widths: tuple[float, ...] = ()

    @property
    def title(self) -> str:
        """The tower's name in messages."""
        return self.name.replace("_", " ")

    @abc.abstractmethod
    def build(self, embed_dim: int, execution: Execution) -> nn.Module:
        """Returns the module. The two subclasses define its arguments."""

    def problems(self, prefix: str) -> list[str]:
        """Returns what is wrong with these values, a line for each; ``prefix`` is the config section's name."""
        return []

    def numbers(self) -> tuple[dict[str, int | range], ...]:
        """Returns the numbers in the names of its parameters, as groups such as ``{"layer": range(12)}``.

        A parameter whose path here has a ``{number}`` exists once for each group. A parameter whose name in other
        libraries has a number with a range is one array here, stacked along its first axis.
        """
        return ({},)

    @classmethod
    def from_shapes(cls, shapes: Shapes, activation: str) -> Self:
        """Returns the description that fits a file's tensors, for a file without a config.

        Raises:
          ShapeError: the shapes do not fit this tower, or do not determine all its fields.
        """
        raise ShapeError(
            f"which {cls.name} it is cannot be seen from the tensors; put the model's config beside the file"
        )

    def as_published(self) -> Self:
        """Returns a copy with default values of the activation and the training fields, as in a preset."""
        names = ("activation", *self.training_fields)
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in names}
        return dataclasses.replace(self, **defaults)


class ImageTower(Tower):
    """Images to features. ``build`` returns a module named "vision" that is called with ``(images, train)``.

    It maps normalized images ``[B, S, S, 3]`` to features ``[B, embed_dim]`` in ``execution.dtype``, not of unit
    length. S is any multiple of ``side_unit``. If ``num_patches`` is not None, the module also takes ``kept_patches``:
    int32 ``[B, K]``, the patches to compute.

    Attributes:
      image_size: S, in pixels. All descriptions have this field.
      side_unit: S must be a multiple of it.
      positions: the path of the parameter ``[1 + n * n, W]`` that is resized for images of another size; n is
        ``grid_side(S)``. Empty: there is none, and the parameters fit images of any size.
      feature_layer: the module whose output a linear probe uses: the last one before the projection into the shared
        space, or "vision", the tower itself.
      optimizer_defaults: defaults of ``config.optimizer`` that depend on the tower.
    """

    section = "vision"
    image_size: int
    side_unit: int = 1
    positions: ClassVar[tuple[str, ...]] = ()
    feature_layer: ClassVar[str] = "vision"
    optimizer_defaults: ClassVar[dict[str, Any]] = {"beta2": 0.98, "epsilon": 1e-6}  # tables 19 and 20 of the paper

    def grid_side(self, image_size: int) -> int:
        """Returns the number of positions along each side of an image of this size."""
        return image_size // self.side_unit

    def num_patches(self, image_size: int) -> int | None:
        """Returns the number of patches of an image of this size; None: the tower has no patches to leave out."""
        return None

    @abc.abstractmethod
    def flops(self, embed_dim: int, patch_dropout: float) -> int:
        """Returns flops of one image, forward and backward: see :mod:`clip_jax.planning.model_flops`."""


class TextTower(Tower):
    """Texts to features. ``build`` returns a module named "text" that is called with ``(tokens,)``.

    It maps int32 ``[B, L]`` to features ``[B, embed_dim]`` in ``execution.dtype``, not of unit length. The end of a
    text is the token with the highest id. Tokens after it must not change the features: callers cut them off.

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
        """Returns flops of one text, forward and backward: see :mod:`clip_jax.planning.model_flops`."""
