"""The contrastive loss of the CLIP paper (arXiv 2103.00020, section 2.3 and figure 3).

In the "gather" form, each device gathers the texts of all devices. The "blockwise" form is in losses/blockwise.py.
"""

import dataclasses
import functools
import math
from typing import Self

import jax
import jax.numpy as jnp
import ml_collections

from clip_jax.losses.base import Loss, Metrics, block_size_problems
from clip_jax.losses.blockwise import blockwise_softmax_loss
from clip_jax.losses.products import Products
from clip_jax.losses.shards import METRIC_SPECS, REPLICATED, ROWS, all_mean, all_sum, global_size, pair_indices
from clip_jax.settings import may_change, must_be_one_of
from clip_jax.sharding import BATCH_AXES


def softmax_loss(image_embeddings, text_embeddings, logit_scale):
    """Figure 3 of the paper, for embeddings ``[N, D]`` of unit length on one device."""
    logits = jnp.exp(logit_scale) * image_embeddings @ text_embeddings.T  # [N, N]
    image_to_text = -jax.nn.log_softmax(logits, axis=1).diagonal()  # [N]: each image's own text among all texts
    text_to_image = -jax.nn.log_softmax(logits, axis=0).diagonal()  # [N]: each text's own image among all images
    return (image_to_text.mean() + text_to_image.mean()) / 2


MAX_LOGIT_SCALE = math.log(100)
FORMS = ("auto", "gather", "blockwise")
GATHERED_LOGITS_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Softmax(Loss):
    """:func:`softmax_loss` over the global batch. Each device computes its own rows of the N x N similarities.

    ``form`` changes memory and time, and the result only by rounding: with "gather" a device holds its rows of the
    similarities, with "blockwise" one block of them (:mod:`clip_jax.losses.blockwise`). "auto" is :func:`choose_form`.
    """

    form: str = may_change("auto")
    block_size: int = may_change(0)  # of the blockwise form; 0: the default for the kind of device

    parameters = (("logit_scale", math.log(1 / 0.07)),)

    @staticmethod
    def problems(section: ml_collections.ConfigDict) -> list[str]:
        return must_be_one_of(section, "form", FORMS, "config.loss") + block_size_problems(section)

    def resolved(self, global_batch_size: int, block_size: int) -> Self:
        form = choose_form(global_batch_size, self.mesh.size) if self.form == "auto" else self.form
        return dataclasses.replace(self, form=form, block_size=self.block_size or block_size)

    def __call__(
        self, image_embeddings: jax.Array, text_embeddings: jax.Array, parameters: dict[str, jax.Array]
    ) -> tuple[jax.Array, Metrics]:
        inputs = image_embeddings, text_embeddings, parameters["logit_scale"]
        if self.form == "blockwise":
            return blockwise_softmax_loss(*inputs, self)
        # check_vma verifies that replicated outputs are equal on all devices, and sums gradients of replicated inputs.
        sharded = jax.shard_map(
            functools.partial(_gathered_loss, products=self.products),
            mesh=self.mesh,
            in_specs=(ROWS, ROWS, REPLICATED),
            out_specs=(REPLICATED, METRIC_SPECS),
            check_vma=True,
        )
        return sharded(*inputs)

    def after_update(self, parameters: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Limits the temperature: logits are never scaled by more than 100 (section 2.5 of the paper)."""
        return parameters | {"logit_scale": jnp.clip(parameters["logit_scale"], 0, MAX_LOGIT_SCALE)}

    @property
    def memory_option(self) -> str:
        return "--config.loss.form=blockwise" if self.form == "gather" else ""


def choose_form(global_batch_size: int, num_devices: int) -> str:
    """Returns "gather" while a device's ``[N / devices, N]`` float32 logits take at most 64 MiB, otherwise "blockwise".

    That is up to 65,536 pairs on 256 devices, and 4,096 on one. The table has temporaries and time of the loss and its
    gradients for embeddings of 768 numbers on 256 v5e chips, as estimated by the TPU's compiler. The time is that of
    the arithmetic. The blockwise form also waits for its texts, which pass through the devices twice.

    ========= ================ ================= ==========================
    N         logits of a chip gather            blockwise
    ========= ================ ================= ==========================
    32,768    17 MB            134 MB, 0.9 ms    0.4 MB, 5.2 ms
    65,536    67 MB            470 MB, 3.3 ms    0.4 MB, 7.9 ms
    131,072   268 MB           1,344 MB, 13 ms   0.4 MB, 18 ms
    1,048,576 17,180 MB        does not fit      26 MB, 0.97 s
    ========= ================ ================= ==========================
    """
    return "gather" if 4 * global_batch_size**2 <= GATHERED_LOGITS_BYTES * num_devices else "blockwise"


def _gathered_loss(
    images: jax.Array, texts: jax.Array, logit_scale: jax.Array, *, products: Products
) -> tuple[jax.Array, Metrics]:
    local = images.shape[0]
    all_max = functools.partial(jax.lax.pmax, axis_name=BATCH_AXES)
    total = global_size(images)
    all_texts = jax.lax.all_gather(texts, BATCH_AXES, tiled=True)  # [N, D]
    logits = jnp.exp(logit_scale) * products.embeddings(images, all_texts.T)  # [N / devices, N]

    columns = pair_indices(local)
    positives = jnp.take_along_axis(logits, columns[:, None], axis=1)[:, 0]  # [N / devices]

    row_log_sums = jax.nn.logsumexp(logits, axis=1)  # [N / devices]
    column_max = all_max(jax.lax.stop_gradient(logits.max(axis=0)))  # [N]
    column_log_sums = column_max + jnp.log(all_sum(jnp.exp(logits - column_max).sum(axis=0)))  # [N], on every device

    image_to_text = all_mean(row_log_sums - positives)
    text_to_image = (column_log_sums.sum() - all_sum(positives.sum())) / total

    # A tie counts as wrong, as in accuracies().
    all_positives = jax.lax.all_gather(positives, BATCH_AXES, tiled=True)  # [N]
    row_ranks = (logits >= positives[:, None]).sum(axis=1)  # [N / devices], the positive itself included
    column_ranks = all_sum((logits >= all_positives).sum(axis=0))  # [N]
    metrics = {
        "image_to_text_accuracy": all_mean(row_ranks == 1),
        "text_to_image_accuracy": (column_ranks == 1).mean(),
        "pair_losses": (row_log_sums + column_log_sums[columns]) / 2 - positives,
    }
    return (image_to_text + text_to_image) / 2, jax.tree.map(jax.lax.stop_gradient, metrics)
