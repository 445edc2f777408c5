"""Gradients of a loss over the whole batch, from activations of a part of it at a time (GradCache, arXiv 2101.06983).

The contrastive loss compares every image with every text, so gradients of parts cannot simply be added up. Instead
all parts are embedded without keeping activations; the loss over all embeddings gives its gradient by each of them;
and each part is embedded once more, now with activations, to carry its embeddings' gradients on to the parameters.
That is the gradient of the whole batch, for the price of one more forward pass.

BatchNorm is the exception: its statistics are those of a part, as in a smaller batch, and its running averages move
once a part. Everything else is exact.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax.sharding import BATCH_AXES, batch_sharding

LOGIT_PARAMETERS = ("logit_scale", "logit_bias")  # those that the loss takes beside the embeddings

# params, batch_stats and a batch to (image_embeddings, text_embeddings) and the new batch_stats.
Embed = Callable[[dict, dict, dict], tuple[tuple[jax.Array, jax.Array], dict]]
# image_embeddings, text_embeddings and the logit parameters to the loss and its metrics.
Loss = Callable[[jax.Array, jax.Array, dict], tuple[jax.Array, dict]]


def loss_and_gradients(
    embed: Embed,
    loss: Loss,
    params: dict,
    batch_stats: dict,
    batch: dict[str, jax.Array],
    accumulation_steps: int,
    mesh: Mesh,
) -> tuple[jax.Array, dict, dict, dict]:
    """The loss over a batch, arrays ``[B, ...]`` by name, embedded in ``accumulation_steps`` parts.

    ``accumulation_steps`` times the number of devices divides B. What is drawn for each pair, such as the patches to
    keep, is part of the batch, so that it does not depend on the number of parts.

    Returns:
      The loss, its metrics, float32 gradients by ``params``, and the new ``batch_stats``.
    """
    logit_parameters = {name: params[name] for name in LOGIT_PARAMETERS if name in params}
    if accumulation_steps == 1:

        def whole(params):
            embeddings, updated = embed(params, batch_stats, batch)
            value, metrics = loss(*embeddings, {name: params[name] for name in logit_parameters})
            return value, (metrics, updated)

        (value, (metrics, updated)), gradients = jax.value_and_grad(whole, has_aux=True)(params)
        return value, metrics, gradients, updated

    parts = jax.tree.map(lambda array: split_into_parts(array, accumulation_steps, mesh), batch)

    def embed_part(_, part):
        return None, embed(params, batch_stats, part)[0]

    _, embeddings = jax.lax.scan(embed_part, None, parts)  # each [K, B / K, D]
    embeddings = jax.tree.map(lambda array: join_parts(array, mesh), embeddings)
    over_embeddings = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (value, metrics), (*cotangents, by_logit_parameters) = over_embeddings(*embeddings, logit_parameters)
    cotangents = jax.tree.map(lambda array: split_into_parts(array, accumulation_steps, mesh), tuple(cotangents))

    def add_gradients(carry, part):
        sums, stats = carry
        inputs, cotangent = part
        _, backward, updated = jax.vjp(lambda params: embed(params, stats, inputs), params, has_aux=True)
        (gradients,) = backward(cotangent)
        return (jax.tree.map(jnp.add, sums, gradients), updated), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    (gradients, updated), _ = jax.lax.scan(add_gradients, (zeros, batch_stats), (parts, cotangents))
    return value, metrics, gradients | by_logit_parameters, updated


def split_into_parts(array: jax.Array, parts: int, mesh: Mesh) -> jax.Array:
    """``[B, ...]`` to ``[K, B / K, ...]``: of each device's rows a K-th in each part, so that nothing moves."""
    devices, rest = mesh.size, array.shape[1:]
    by_device = array.reshape(devices, parts, -1, *rest).swapaxes(0, 1)  # [K, devices, B / K / devices, ...]
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
    return jax.lax.with_sharding_constraint(by_device.reshape(parts, -1, *rest), sharding)


def join_parts(array: jax.Array, mesh: Mesh) -> jax.Array:
    """The inverse of :func:`split_into_parts`."""
    parts, rest = array.shape[0], array.shape[2:]
    by_device = array.reshape(parts, mesh.size, -1, *rest).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(by_device.reshape(-1, *rest), batch_sharding(mesh))
