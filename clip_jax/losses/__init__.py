"""The registry of losses by their name in ``config.loss.kind``, and the functions that read ``config.loss``."""

import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from clip_jax.losses.base import Loss
from clip_jax.losses.products import products_on
from clip_jax.losses.sigmoid import Sigmoid
from clip_jax.losses.softmax import Softmax
from clip_jax.models.clip import loss_parameters_of
from clip_jax.models.execution import execution_on
from clip_jax.settings import changeable, must_be_one_of

__all__ = [
    "LOSSES",
    "default_section",
    "keys_that_may_change",
    "loss_type",
    "make_loss",
    "problems",
    "starting_parameters",
]

LOSSES: dict[str, type[Loss]] = {
    "softmax": Softmax,  # the paper's
    "sigmoid": Sigmoid,  # SigLIP's
}


def loss_type(section: ml_collections.ConfigDict) -> type[Loss]:
    """The class of the loss that ``config.loss`` names."""
    return LOSSES[section.kind]


def make_loss(section: ml_collections.ConfigDict, mesh: Mesh, global_batch_size: int, dtype: jnp.dtype) -> Loss:
    """The loss that ``config.loss`` describes, with a value for every "auto" and every 0 that means a default.

    Args:
      section: ``config.loss``.
      mesh: the ``("data", "fsdp")`` mesh.
      global_batch_size: pairs in a step, over all devices.
      dtype: the dtype that the towers compute in.
    """
    kind = loss_type(section)
    loss = kind(mesh, products_on(mesh, dtype), **{key: section[key] for key in kind.config_keys()})
    return loss.resolved(global_batch_size, execution_on(mesh.devices.flat[0]).loss_block_size)


def default_section() -> ml_collections.ConfigDict:
    """``config.loss`` with its defaults: ``kind``, and the keys of all losses.

    Raises:
      ValueError: two losses have the same key with different defaults.
    """
    section = ml_collections.ConfigDict({"kind": "softmax"})
    for kind, loss in LOSSES.items():
        for key, field in loss.config_keys().items():
            if section.get(key, field.default) != field.default:
                raise ValueError(f"config.loss.{key}: another loss than {kind!r} has this key with another default")
            section[key] = field.default
    return section


def problems(section: ml_collections.ConfigDict) -> list[str]:
    """One line for each mistake in ``config.loss``, including the keys of losses that it does not select."""
    found = must_be_one_of(section, "kind", LOSSES, "config.loss")
    found += [problem for loss in LOSSES.values() for problem in loss.problems(section)]
    return list(dict.fromkeys(found))  # losses share keys


def keys_that_may_change() -> set[str]:
    """The keys of ``config.loss`` that a resumed run may change."""
    return {name for loss in LOSSES.values() for name in changeable(loss)}


def starting_parameters(params: dict, section: ml_collections.ConfigDict) -> dict:
    """A model's ``params``, with the loss's parameters as training with ``config.loss`` starts from them.

    See :meth:`clip_jax.losses.base.Loss.starting_from`.
    """
    learned = {name: np.asarray(params[name]) for name, _ in loss_parameters_of(params)}
    towers = {name: value for name, value in params.items() if name not in learned}
    return towers | loss_type(section).starting_from(learned)
