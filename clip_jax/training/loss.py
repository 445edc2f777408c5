"""The symmetric contrastive loss over the global batch (section 2.3 and figure 3 of the paper)."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from clip_jax.training.sharding import BATCH_AXES


def contrastive_loss(
    image_embeddings: jax.Array, text_embeddings: jax.Array, logit_scale: jax.Array, mesh: Mesh
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Symmetric InfoNCE; each device computes its rows of the N x N similarities, once.

    A device holds N / devices images and as many texts. It gathers all texts and forms its ``[N / devices, N]``
    logits: their rows are complete, and the columns' log-sum-exps are combined over the devices.

    Args:
      image_embeddings: float32 ``[N, D]``, unit length, first axis split over the mesh.
      text_embeddings: the same; row i belongs to image i.
      logit_scale: float32 scalar, the natural logarithm of the inverse temperature.
      mesh: the ``("data", "fsdp")`` mesh.

    Returns:
      The loss, a float32 scalar, and ``image_to_text_accuracy`` and ``text_to_image_accuracy`` within the batch.
    """
    rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    # check_vma verifies that what is returned as replicated is, and makes the gradients of replicated inputs sums.
    sharded = jax.shard_map(_local_loss, mesh=mesh, in_specs=(rows, rows, whole), out_specs=whole, check_vma=True)
    return sharded(image_embeddings, text_embeddings, logit_scale)


def _local_loss(images: jax.Array, texts: jax.Array, logit_scale: jax.Array):
    local = images.shape[0]
    all_sum = functools.partial(jax.lax.psum, axis_name=BATCH_AXES)
    all_max = functools.partial(jax.lax.pmax, axis_name=BATCH_AXES)
    total = local * jax.lax.axis_size(BATCH_AXES)
    all_texts = jax.lax.all_gather(texts, BATCH_AXES, tiled=True)  # [N, D]
    # Full float32 products: a TPU's default would round the similarities to bfloat16, 0.4 % of a logit of 100.
    products = jnp.matmul(images, all_texts.T, precision=jax.lax.Precision.HIGHEST)
    logits = jnp.exp(logit_scale) * products  # [N / devices, N]

    first_row = jax.lax.axis_index(BATCH_AXES) * local  # the positive of local row r is column first_row + r
    columns = first_row + jnp.arange(local)
    positives = jnp.take_along_axis(logits, columns[:, None], axis=1)[:, 0]  # [N / devices]

    row_log_sums = jax.nn.logsumexp(logits, axis=1)  # [N / devices]
    column_max = all_max(jax.lax.stop_gradient(logits.max(axis=0)))  # [N]
    column_log_sums = column_max + jnp.log(all_sum(jnp.exp(logits - column_max).sum(axis=0)))  # [N], on every device

    image_to_text = all_sum((row_log_sums - positives).sum()) / total
    text_to_image = (column_log_sums.sum() - all_sum(positives.sum())) / total

    # A tie counts as wrong: a collapsed model, to which all is alike, must not look like a perfect one.
    all_positives = jax.lax.all_gather(positives, BATCH_AXES, tiled=True)  # [N]
    row_ranks = (logits >= positives[:, None]).sum(axis=1)  # [N / devices], the positive itself included
    column_ranks = all_sum((logits >= all_positives).sum(axis=0))  # [N]
    metrics = {
        "image_to_text_accuracy": all_sum((row_ranks == 1).sum()) / total,
        "text_to_image_accuracy": (column_ranks == 1).mean(),
    }
    return (image_to_text + text_to_image) / 2, jax.tree.map(jax.lax.stop_gradient, metrics)
