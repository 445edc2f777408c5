"""The softmax loss for batches whose similarities do not fit into memory: a device holds one block of them at a time.

The texts pass through all devices once for the denominators of the softmax, and once more for the gradients. The
gradients are written by hand, because differentiating the first pass would keep every block in memory.
"""

import functools

import jax
import jax.numpy as jnp

from clip_jax.losses.base import Loss, Metrics
from clip_jax.losses.ring import (
    MOST_NEGATIVE,
    Block,
    embedding_gradients,
    merge_sums,
    pair_masks,
    ring,
    ring_accuracies,
)
from clip_jax.losses.shards import METRIC_SPECS, REPLICATED, ROWS, all_mean, all_sum, global_size


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blockwise_softmax_loss(
    images: jax.Array, texts: jax.Array, logit_scale: jax.Array, loss: Loss
) -> tuple[jax.Array, Metrics]:
    """The loss and metrics of :class:`clip_jax.losses.softmax.Softmax`.

    Args:
      images: float32 ``[N, D]``, unit length, first axis split over the mesh.
      texts: the same for texts; text i matches image i.
      logit_scale: float32 scalar.
      loss: a ``Softmax``, for its mesh, products and ``block_size``. A device holds at most
        ``[block_size, block_size]`` logits. ``block_size`` need not divide the batch.
    """
    return _forward(images, texts, logit_scale, loss)[0]


def _forward(images, texts, logit_scale, loss):
    forward = jax.shard_map(
        functools.partial(_sums, loss=loss),
        mesh=loss.mesh,
        in_specs=(ROWS, ROWS, REPLICATED),
        out_specs=(REPLICATED, METRIC_SPECS, ROWS),
    )
    value, metrics, sums = forward(images, texts, logit_scale)
    return (value, metrics), (images, texts, logit_scale, sums)


def _backward(loss, saved, cotangents):
    backward = jax.shard_map(
        functools.partial(_gradients, loss=loss),
        mesh=loss.mesh,
        in_specs=(ROWS, ROWS, REPLICATED, ROWS, REPLICATED),
        out_specs=(ROWS, ROWS, REPLICATED),
    )
    return backward(*saved, cotangents[0])


blockwise_softmax_loss.defvjp(_forward, _backward)


def _sums(images, texts, logit_scale, *, loss):
    """The loss, the metrics, and for each of the device's pairs its logit and the log-sum-exp of its negatives."""

    def compare(image: Block, text: Block) -> tuple[Block, Block]:
        logits = jnp.exp(logit_scale) * loss.products.embeddings(image["embedding"], text["embedding"].T)
        positive, negative = pair_masks(image, text)
        negatives = jnp.where(negative, logits, MOST_NEGATIVE)
        return (
            _exponential_sums(negatives, axis=1) | {"positive": jnp.where(positive, logits, 0).sum(axis=1)},
            _exponential_sums(negatives, axis=0),
        )

    by_image, by_text = ring(
        compare, _merge_exponential_sums, {"embedding": images}, {"embedding": texts}, loss.block_size
    )
    positives = by_image["positive"]
    sums = {
        "positive": positives,
        "by_image": by_image["largest"] + jnp.log(by_image["sum"]),
        "by_text": by_text["largest"] + jnp.log(by_text["sum"]),
    }
    # -log(e^p / (e^p + e^n)) = softplus(n - p) for the positive p and the negatives' log-sum-exp n.
    losses = jax.nn.softplus(sums["by_image"] - positives) + jax.nn.softplus(sums["by_text"] - positives)
    metrics = ring_accuracies(positives, by_image, by_text) | {"pair_losses": losses / 2}
    return all_mean(losses) / 2, metrics, sums


def _gradients(images, texts, logit_scale, sums, cotangent, *, loss):
    """The gradients with respect to the device's images, its texts and logit_scale, times ``cotangent``."""
    positives = sums["positive"]
    image_log_sums, text_log_sums = (jnp.logaddexp(sums[name], positives) for name in ("by_image", "by_text"))

    def compare(image: Block, text: Block) -> tuple[Block, Block]:
        logits = jnp.exp(logit_scale) * loss.products.embeddings(image["embedding"], text["embedding"].T)
        _, negative = pair_masks(image, text)
        softmaxes = jnp.exp(logits - image["log_sum"][:, None]) + jnp.exp(logits - text["log_sum"])
        return embedding_gradients(jnp.where(negative, softmaxes, 0), image, text, loss.products)

    by_image, by_text = ring(
        compare,
        merge_sums,
        {"embedding": images, "log_sum": image_log_sums},
        {"embedding": texts, "log_sum": text_log_sums},
        loss.block_size,
    )
    positive_gradients = -jax.nn.sigmoid(sums["by_image"] - positives) - jax.nn.sigmoid(sums["by_text"] - positives)
    factor = cotangent * jnp.exp(logit_scale) / (2 * global_size(positives))
    image_gradients = factor * (by_image["gradient"] + positive_gradients[:, None] * texts)
    text_gradients = factor * (by_text["gradient"] + positive_gradients[:, None] * images)
    # d loss / d logit_scale = sum of d loss / d logit * logit. Each logit is linear in its image embedding, so this is
    # the sum of d loss / d image * image.
    return image_gradients, text_gradients, all_sum((images * image_gradients).sum())


def _exponential_sums(logits: jax.Array, axis: int) -> Block:
    """The sum of ``exp(logits - largest)`` along the axis, and the largest logit, to rescale the sum later."""
    largest = logits.max(axis=axis)
    return {"largest": largest, "sum": jnp.exp(logits - jnp.expand_dims(largest, axis)).sum(axis=axis)}


def _merge_exponential_sums(one: Block, other: Block) -> Block:
    largest = jnp.maximum(one["largest"], other["largest"])
    one, other = (x | {"sum": x["sum"] * jnp.exp(x["largest"] - largest)} for x in (one, other))
    return merge_sums(one, other)
