"""The training step: one program over the mesh, from uint8 images and tokens to a new state and metrics."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from clip_jax.data.sources import source_names
from clip_jax.losses import make_loss
from clip_jax.models.clip import CLIP, normalize_images
from clip_jax.models.patch_dropout import choose_patches
from clip_jax.sharding import batch_sharding, replicated
from clip_jax.training.accumulation import loss_and_gradients
from clip_jax.training.state import TrainState, abstract_state

Batch = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    config: ml_collections.ConfigDict, model: CLIP, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainStep:
    """Returns ``step(state, batch) -> (state, metrics)``, jitted over the mesh; the old state is donated.

    A batch is split over all devices. It has these arrays:

    - ``image``: uint8 ``[B, S, S, 3]``;
    - ``tokens``: int32 ``[B, L]``;
    - ``seed``: uint32 ``[B]``, only for patch dropout. A pair's random numbers depend on its seed alone;
    - ``source``: int32 ``[B]``, optional: each pair's index in the sources of ``config.data.source``.

    Metrics are float32 scalars: loss, both accuracies within the batch, logit_scale (as multiplied), gradient_norm, and
    with ``source`` also ``loss/NAME`` for each source, which is NaN if the batch has no pair of it. With
    ``config.accumulation_steps`` above 1, see :mod:`clip_jax.training.accumulation`.
    """
    loss = make_loss(config.loss, mesh, config.global_batch_size, config.model.dtype)
    split = batch_sharding(mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))

    def train_step(state: TrainState, batch: Batch):
        if config.model.patch_dropout:
            num_patches = model.preset.vision.num_patches(batch["image"].shape[1])
            kept = choose_patches(batch["seed"], num_patches, config.model.patch_dropout)
            batch = batch | {"kept_patches": jax.lax.with_sharding_constraint(kept, split)}
        value, metrics, gradients, batch_stats = loss_and_gradients(
            functools.partial(embed, model), loss, state.variables, batch, config.accumulation_steps, mesh
        )
        pair_losses = metrics.pop("pair_losses")
        if "source" in batch:
            metrics |= losses_by_source(pair_losses, batch["source"], source_names(config.data.source))
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params |= loss.after_update(loss.parameters_in(params))
        metrics |= {
            "loss": value,
            "logit_scale": jnp.exp(state.params["logit_scale"]),
            "gradient_norm": optax.tree.norm(gradients),
        }
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, split),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def embed(model: CLIP, params: dict, batch_stats: dict, batch: Batch) -> tuple[tuple[jax.Array, jax.Array], dict]:
    """Returns image and text embeddings of a batch, float32 ``[B, D]`` of unit length, and the new ``batch_stats``."""
    (image_embeddings, text_embeddings, _), updated = model.apply(
        {"params": params, "batch_stats": batch_stats},
        normalize_images(batch["image"], model.preset.preprocessing),
        batch["tokens"],
        train=True,
        kept_patches=batch.get("kept_patches"),
        mutable=["batch_stats"],
    )
    return (image_embeddings, text_embeddings), updated.get("batch_stats", {})


def losses_by_source(pair_losses: jax.Array, sources: jax.Array, names: Sequence[str]) -> dict[str, jax.Array]:
    """Returns the mean loss of the pairs of each source, by ``loss/NAME``.

    Args:
      pair_losses: float32 ``[B]``.
      sources: int32 ``[B]``, indices into ``names``.
      names: names of the sources.
    """
    return {f"loss/{name}": jnp.mean(pair_losses, where=sources == index) for index, name in enumerate(names)}
