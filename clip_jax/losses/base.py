"""The interface of a loss: its config keys, its learned parameters with their limits, and its value for a batch.

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

    Subclasses are frozen dataclasses. Each field with a default is a key of ``config.loss`` with the same name and
    default. A resumed run may change the keys that are declared with :func:`clip_jax.settings.may_change`.

    Attributes:
      mesh: the ``("data", "fsdp")`` mesh that the batch is split over.
      products: how to multiply float32 matrices on its devices.
      parameters: names and initial values of the float32 scalars that the loss learns. The model stores them next to
        its towers. One must be ``logit_scale``, the natural logarithm of the factor that predictions multiply cosines
        by.
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
        """The same loss, with a value for every "auto" and every 0 that means a default.

        Args:
          global_batch_size: pairs in a step, over all devices.
          block_size: the default for this kind of device (:mod:`clip_jax.models.execution`).
        """
        return self

    def parameters_in(self, params: dict) -> dict[str, jax.Array]:
        """The loss's parameters among a model's ``params``, by name."""
        return {name: params[name] for name, _ in self.parameters}

    @abc.abstractmethod
    def __call__(
        self, image_embeddings: jax.Array, text_embeddings: jax.Array, parameters: dict[str, jax.Array]
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a batch, differentiable with respect to all arguments.

        Args:
          image_embeddings: float32 ``[N, D]``, unit length, first axis split over the mesh.
          text_embeddings: the same for texts; text i matches image i.
          parameters: float32 scalars by the names in the class's ``parameters``.

        Returns:
          The loss, a float32 scalar, and its metrics. ``image_to_text_accuracy`` and ``text_to_image_accuracy`` are
          float32 scalars (see :func:`accuracies`). The mean of ``pair_losses``, float32 ``[N]``, is the loss.

        Raises:
          ValueError: the batch cannot be divided among the devices.
        """

    def after_update(self, parameters: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The loss's parameters after an update of the optimizer, within the loss's limits."""
        return parameters

    @classmethod
    def starting_from(cls, learned: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The parameters that training starts with, if the towers come from a trained model.

        Args:
          learned: the loss parameters of that model, float32 scalars by name.

        Returns:
          ``learned`` if it has the same names as this loss's parameters; otherwise the initial values. A temperature
          learned under another loss is not a useful starting value.
        """
        initial = {name: np.float32(value) for name, value in cls.parameters}
        return learned if learned.keys() == initial.keys() else initial

    @property
    def memory_option(self) -> str:
        """The flag that makes the loss hold a block of the similarities instead of rows of them; empty if none does."""
        return ""


def accuracies(logits: jax.Array) -> Metrics:
    """``image_to_text_accuracy`` and ``text_to_image_accuracy``, float32 scalars, from all logits, float32 ``[N, N]``.

    A tie counts as wrong: otherwise a collapsed model, whose embeddings are all the same, would look perfect.
    """
    positives = logits.diagonal()
    ranks = {
        "image_to_text_accuracy": (logits >= positives[:, None]).sum(axis=1),  # the positive itself included
        "text_to_image_accuracy": (logits >= positives).sum(axis=0),
    }
    return {name: (rank == 1).mean() for name, rank in ranks.items()}


def block_size_problems(section: ml_collections.ConfigDict) -> list[str]:
    """One line if ``config.loss.block_size`` is wrong, otherwise nothing."""
    size = section.block_size
    return [] if size >= 0 else [f"config.loss.block_size={size} must not be negative; 0: by the kind of device"]
