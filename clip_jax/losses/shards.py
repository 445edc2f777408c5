"""Helpers for losses inside ``shard_map``, where each device has its own N / devices images and texts."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from clip_jax.sharding import BATCH_AXES

ROWS, REPLICATED = PartitionSpec(BATCH_AXES), PartitionSpec()
METRIC_SPECS = {"image_to_text_accuracy": REPLICATED, "text_to_image_accuracy": REPLICATED, "pair_losses": ROWS}


def all_sum(x: jax.Array) -> jax.Array:
    """The sum over all devices."""
    return jax.lax.psum(x, BATCH_AXES)


def global_size(local: jax.Array) -> int:
    """N, from an array of the device's N / devices pairs."""
    return len(local) * jax.lax.axis_size(BATCH_AXES)


def all_mean(local: jax.Array) -> jax.Array:
    """The mean over all N pairs of an array ``[N / devices]``."""
    return all_sum(local.sum()) / global_size(local)


def pair_indices(local: int) -> jax.Array:
    """The indices of the device's pairs in the global batch, int32 ``[local]``."""
    return jax.lax.axis_index(BATCH_AXES) * local + jnp.arange(local)
