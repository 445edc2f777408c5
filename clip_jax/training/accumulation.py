"""Computes the gradient of a batch in parts, so that memory holds the activations of one part at a time (GradCache).

The contrastive loss compares every image with every text, so gradients of parts cannot be added up. Instead:

1. all parts are embedded, without saving activations;
2. the loss over all embeddings gives the gradient of each embedding;
3. each part is embedded again, now with activations, to propagate these gradients to the parameters.

The result is the gradient of the whole batch, at the cost of one more forward pass. Only BatchNorm differs: its
statistics are those of a part, and its running averages are updated once for each part.

Source: arXiv 2101.06983.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax.losses.base import Loss
from clip_jax.sharding import BATCH_AXES, batch_sharding

# Called with params, batch_stats and a batch; returns (image_embeddings, text_embeddings) and the new batch_stats.
Embed = Callable[[dict, dict, dict], tuple[tuple[jax.Array, jax.Array], dict]]


def loss_and_gradients(
    embed: Embed,
    loss: Loss,
    variables: dict,
    batch: dict[str, jax.Array],
    accumulation_steps: int,
    mesh: Mesh,
) -> tuple[jax.Array, dict, dict, dict]:
    """Returns the loss and the gradients of a batch that is embedded in ``accumulation_steps`` parts.

    Args:
      embed: the model.
      loss: called with the embeddings of the whole batch.
      variables: ``params``, which include the loss's parameters, and ``batch_stats``.
      batch: arrays ``[B, ...]`` by name. It includes what is drawn at random for each pair, such as the patches to
        keep, which therefore does not depend on the number of parts.
      accumulation_steps: its product with the number of devices must divide B.
      mesh: the devices that the batch is split over.

    Returns:
      The loss, its metrics, float32 gradients by ``params``, and the new ``batch_stats``.
    """
    params, batch_stats = variables["params"], variables["batch_stats"]
    if accumulation_steps == 1:

        def whole(params):
            embeddings, updated = embed(params, batch_stats, batch)
            value, metrics = loss(*embeddings, loss.parameters_in(params))
            return value, (metrics, updated)

        (value, (metrics, updated)), gradients = jax.value_and_grad(whole, has_aux=True)(params)
        return value, metrics, gradients, updated

    parts = jax.tree.map(lambda array: split_into_parts(array, accumulation_steps, mesh), batch)

    def embed_part(_, part):
        return None, embed(params, batch_stats, part)[0]

    _, embeddings = jax.lax.scan(embed_part, None, parts)  # each [K, B / K, D]
    embeddings = jax.tree.map(lambda array: join_parts(array, mesh), embeddings)
    loss_and_cotangents = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (value, metrics), (*cotangents, loss_gradients) = loss_and_cotangents(*embeddings, loss.parameters_in(params))
    cotangents = jax.tree.map(lambda array: split_into_parts(array, accumulation_steps, mesh), tuple(cotangents))

    def add_gradients(carry, part):
        sums, stats = carry
        inputs, cotangent = part
        _, backward, updated = jax.vjp(lambda params: embed(params, stats, inputs), params, has_aux=True)
        (gradients,) = backward(cotangent)
        return (jax.tree.map(jnp.add, sums, gradients), updated), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    (gradients, updated), _ = jax.lax.scan(add_gradients, (zeros, batch_stats), (parts, cotangents))
    return value, metrics, gradients | loss_gradients, updated


def split_into_parts(array: jax.Array, parts: int, mesh: Mesh) -> jax.Array:
    """``[B, ...]`` to ``[K, B / K, ...]``: each part has a K-th of every device's rows, so no row changes device."""
    devices, rest = mesh.size, array.shape[1:]
    by_device = array.reshape(devices, parts, -1, *rest).swapaxes(0, 1)  # [K, devices, B / K / devices, ...]
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
    return jax.lax.with_sharding_constraint(by_device.reshape(parts, -1, *rest), sharding)


def join_parts(array: jax.Array, mesh: Mesh) -> jax.Array:
    """Returns the inverse of :func:`split_into_parts`."""
    parts, rest = array.shape[0], array.shape[2:]
    by_device = array.reshape(parts, mesh.size, -1, *rest).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(by_device.reshape(-1, *rest), batch_sharding(mesh))
