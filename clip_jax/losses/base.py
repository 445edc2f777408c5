"""What every loss has: its parameters, its keys of the config, its value, and what follows an update.

docs/design.md, "How to add a loss", has a worked example.
"""

import abc
import dataclasses
from typing import ClassVar, Self

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from clip_jax.losses.products import Products

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Loss(abc.ABC):
    """A loss of image and text embeddings, for the devices of one mesh.

    A loss is a subclass that is a frozen dataclass. Each of its fields that has a default is a key of ``config.loss``
    with the same name and default. A resumed run may change those declared with
    :func:`clip_jax.settings.may_change`.

    Attributes:
      mesh: the ``("data", "fsdp")`` mesh that the batch is split over.
      products: how to multiply float32 matrices on its devices.
      parameters: names and initial values of the float32 scalars that the loss learns. The model keeps them next to its
        towers. ``logit_scale``, the natural logarithm of what a trained model multiplies cosines by, must be one.
      form: how the loss is computed, in one word, for the planner's report.
    """

    mesh: Mesh
    products: Products

    parameters: ClassVar[tuple[tuple[str, float], ...]]
    form: ClassVar[str] = "plain"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "logit_scale" not in dict(cls.parameters):
            raise TypeError(f"{cls.__name__}.parameters lacks logit_scale, which predictions are made with")

    @classmethod
    def config_keys(cls) -> dict[str, dataclasses.Field]:
        """The keys of ``config.loss`` that this loss reads."""
        return {field.name: field for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING}

    @staticmethod
    def problems(section: ml_collections.ConfigDict) -> list[str]:
        """One line for each mistake in this loss's keys of ``config.loss``: the key, its value and what is allowed."""
        return []

    def resolved(self, global_batch_size: int, block_size: int) -> Self:
        """The same loss with every "auto" and every 0 replaced by a value.

        Args:
          global_batch_size: pairs a step, over all devices.
          block_size: what suits this kind of device (:mod:`clip_jax.models.execution`).
        """
        return self

    def parameters_in(self, params: dict) -> dict[str, jax.Array]:
        """The loss's parameters among a model's ``params``, by name."""
        return {name: params[name] for name, _ in self.parameters}

    @abc.abstractmethod
    def __call__(
        self, image_embeddings: jax.Array, text_embeddings: jax.Array, parameters: dict[str, jax.Array]
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a batch, differentiable by all arguments.

        Args:
          image_embeddings: float32 ``[N, D]``, unit length, first axis split over the mesh.
          text_embeddings: the same; row i belongs to image i.
          parameters: float32 scalars by the names of ``parameters``.

        Returns:
          The loss, a float32 scalar, and its metrics: ``image_to_text_accuracy`` and ``text_to_image_accuracy``, which
          are float32 scalars (see :func:`accuracies`), and ``pair_losses``, float32 ``[N]``, whose mean is the loss.

        Raises:
          ValueError: the batch cannot be divided among the devices.
        """

    def after_update(self, parameters: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The loss's parameters after an update of the optimizer, within the loss's limits."""
        return parameters

    @classmethod
    def starting_from(cls, learned: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The parameters that training starts with, when the towers come from other weights.

        Args:
          learned: float32 scalars by name, from these weights.

        Returns:
          ``learned``, if a loss with the same parameters learned them; otherwise the initial values. A temperature
          learned under another loss is not a useful starting value.
        """
        initial = {name: np.float32(value) for name, value in cls.parameters}
        return learned if learned.keys() == initial.keys() else initial

    @property
    def memory_option(self) -> str:
        """The option with which the loss needs memory for a block of the similarities instead of for rows of them.

        Empty if there is none.
        """
        return ""


def accuracies(logits: jax.Array) -> Metrics:
    """``image_to_text_accuracy`` and ``text_to_image_accuracy`` of a loss that forms all logits, float32 ``[N, N]``.

    A tie counts as wrong: a collapsed model, whose embeddings are all the same, must not look like a perfect one.
    """
    positives = logits.diagonal()
    ranks = {
        "image_to_text_accuracy": (logits >= positives[:, None]).sum(axis=1),  # the positive itself included
        "text_to_image_accuracy": (logits >= positives).sum(axis=0),
    }
    return {name: (rank == 1).mean() for name, rank in ranks.items()}


def block_size_problems(section: ml_collections.ConfigDict) -> list[str]:
    """What is wrong with ``config.loss.block_size``."""
    size = section.block_size
    return [] if size >= 0 else [f"config.loss.block_size={size} must not be negative; 0: by the kind of device"]
