"""SigLIP's loss: classifies each pair of an image and a text independently (arXiv 2303.15343, section 3.2)."""

import dataclasses
import functools
import math
from typing import Self

import jax
import jax.numpy as jnp
import ml_collections

from clip_jax.losses.base import Loss, Metrics, block_size_problems
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
from clip_jax.settings import may_change


def sigmoid_loss(image_embeddings, text_embeddings, logit_scale, logit_bias):
    """Algorithm 1 of the paper, for embeddings ``[N, D]`` of unit length on one device."""
    logits = jnp.exp(logit_scale) * image_embeddings @ text_embeddings.T + logit_bias  # [N, N]
    labels = 2 * jnp.eye(len(logits)) - 1  # 1 for an image and its own text, -1 for any other
    return -jax.nn.log_sigmoid(labels * logits).sum() / len(logits)


@dataclasses.dataclass(frozen=True)
class Sigmoid(Loss):
    """:func:`sigmoid_loss` over the global batch, computed one block of the similarities at a time.

    A device holds at most ``[block_size, block_size]`` logits; ``block_size`` need not divide the batch. The
    temperature is not limited.
    """

    block_size: int = may_change(0)  # 0: the default for the kind of device

    parameters = (("logit_scale", math.log(10)), ("logit_bias", -10.0))
    form = "sigmoid"

    @staticmethod
    def problems(section: ml_collections.ConfigDict) -> list[str]:
        return block_size_problems(section)

    def resolved(self, global_batch_size: int, block_size: int) -> Self:
        return dataclasses.replace(self, block_size=self.block_size or block_size)

    def __call__(
        self, image_embeddings: jax.Array, text_embeddings: jax.Array, parameters: dict[str, jax.Array]
    ) -> tuple[jax.Array, Metrics]:
        return _loss(image_embeddings, text_embeddings, parameters["logit_scale"], parameters["logit_bias"], self)


# No gradient needs a complete sum, so the texts pass through the devices once for both the loss and its gradients. If
# only the loss is used, the compiler removes the gradients' products.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(images, texts, logit_scale, logit_bias, loss):
    return _forward(images, texts, logit_scale, logit_bias, loss)[0]


def _forward(images, texts, logit_scale, logit_bias, loss):
    forward = jax.shard_map(
        functools.partial(_loss_and_gradients, loss=loss),
        mesh=loss.mesh,
        in_specs=(ROWS, ROWS, REPLICATED, REPLICATED),
        out_specs=(REPLICATED, METRIC_SPECS, (ROWS, ROWS, REPLICATED, REPLICATED)),
    )
    value, metrics, gradients = forward(images, texts, logit_scale, logit_bias)
    return (value, metrics), gradients


def _backward(loss, gradients, cotangents):
    return jax.tree.map(lambda gradient: cotangents[0] * gradient, gradients)


_loss.defvjp(_forward, _backward)


def _loss_and_gradients(images, texts, logit_scale, logit_bias, *, loss):
    """The loss, the metrics, and the gradients of the device's images and texts, logit_scale and logit_bias."""

    def compare(image: Block, text: Block) -> tuple[Block, Block]:
        logits = jnp.exp(logit_scale) * loss.products.embeddings(image["embedding"], text["embedding"].T) + logit_bias
        positive, negative = pair_masks(image, text)
        logit_gradients = jnp.where(negative, jax.nn.sigmoid(logits), 0)
        image_gradients, text_gradients = embedding_gradients(logit_gradients, image, text, loss.products)
        negatives = jnp.where(negative, logits, MOST_NEGATIVE)  # softplus(MOST_NEGATIVE) = 0
        return image_gradients | {
            "largest": negatives.max(axis=1),
            "positive": jnp.where(positive, logits, 0).sum(axis=1),
            "loss": jax.nn.softplus(negatives).sum(axis=1),
            "slope": logit_gradients.sum(axis=1),
        }, text_gradients | {"largest": negatives.max(axis=0)}

    by_image, by_text = ring(compare, merge_sums, {"embedding": images}, {"embedding": texts}, loss.block_size)
    positives = by_image["positive"]
    positive_gradients = -jax.nn.sigmoid(-positives)
    factor = jnp.exp(logit_scale) / global_size(positives)
    image_gradients = factor * (by_image["gradient"] + positive_gradients[:, None] * texts)
    text_gradients = factor * (by_text["gradient"] + positive_gradients[:, None] * images)
    gradients = (
        image_gradients,
        text_gradients,
        all_sum((images * image_gradients).sum()),  # as in losses/blockwise.py
        all_mean(by_image["slope"] + positive_gradients),
    )
    losses = by_image["loss"] + jax.nn.softplus(-positives)
    metrics = ring_accuracies(positives, by_image, by_text) | {"pair_losses": losses}
    return all_mean(losses), metrics, gradients
