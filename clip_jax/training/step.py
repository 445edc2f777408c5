"""One training step: uint8 images and tokens in, a new state and metrics out, as one program over the mesh."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from clip_jax.data.sources import source_names
from clip_jax.models.clip import CLIP, MAX_LOGIT_SCALE, normalize_images
from clip_jax.models.patch_dropout import choose_patches
from clip_jax.sharding import batch_sharding, replicated
from clip_jax.training.accumulation import loss_and_gradients
from clip_jax.training.loss import choose_form, contrastive_loss, sigmoid_loss
from clip_jax.training.state import TrainState, abstract_state

TrainStep = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    config: ml_collections.ConfigDict, model: CLIP, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainStep:
    """Returns ``step(state, batch) -> (state, metrics)``, jitted over the mesh; the old state is donated.

    A batch is split over all devices: ``image`` uint8 ``[B, S, S, 3]``, ``tokens`` int32 ``[B, L]``, and for patch
    dropout ``seed`` uint32 ``[B]``, of which each pair's random numbers are made, wherever in the batch it stands. With
    ``source`` int32 ``[B]``, the place of each pair's source among those of ``config.data.source``, the metrics tell
    the loss of each as ``loss/SOURCE``, not a number where the batch has none of it.
    Metrics are float32 scalars: loss, both accuracies within the batch, logit_scale (as multiplied) and
    gradient_norm. With ``config.accumulation_steps`` activations are of that part of the batch at a time
    (:mod:`clip_jax.training.accumulation`).
    """
    split = batch_sharding(mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))

    def embed(params: dict, batch_stats: dict, batch: dict):
        (image_embeddings, text_embeddings, _), updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            normalize_images(batch["image"], model.preset.preprocessing),
            batch["tokens"],
            train=True,
            kept_patches=batch.get("kept_patches"),
            mutable=["batch_stats"],
        )
        return (image_embeddings, text_embeddings), updated.get("batch_stats", {})

    def loss(image_embeddings: jax.Array, text_embeddings: jax.Array, logit_parameters: dict):
        form = config.loss.form
        shared = {"mesh": mesh, "block_size": config.loss.block_size, "dtype": config.model.dtype}
        if config.loss.kind == "sigmoid":
            return sigmoid_loss(image_embeddings, text_embeddings, **logit_parameters, **shared)
        if form == "auto":
            form = choose_form(len(image_embeddings), mesh.size)
        return contrastive_loss(image_embeddings, text_embeddings, **logit_parameters, **shared, form=form)

    def train_step(state: TrainState, batch: dict[str, jax.Array]):
        if config.model.patch_dropout:
            num_patches = model.preset.vision.num_patches(batch["image"].shape[1])
            kept = choose_patches(batch["seed"], num_patches, config.model.patch_dropout)
            batch = batch | {"kept_patches": jax.lax.with_sharding_constraint(kept, split)}
        value, metrics, gradients, batch_stats = loss_and_gradients(
            embed, loss, state.params, state.batch_stats, batch, config.accumulation_steps, mesh
        )
        pair_losses = metrics.pop("pair_losses")
        if "source" in batch:
            metrics |= losses_by_source(pair_losses, batch["source"], source_names(config.data.source))
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if config.loss.kind == "softmax":
            # The paper clips the temperature so that logits are never scaled by more than 100 (section 2.5).
            params["logit_scale"] = jnp.clip(params["logit_scale"], 0, MAX_LOGIT_SCALE)
        metrics = metrics | {
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


def losses_by_source(pair_losses: jax.Array, sources: jax.Array, names: Sequence[str]) -> dict[str, jax.Array]:
    """The mean of ``pair_losses`` float32 ``[B]`` over the pairs of each name; ``sources`` int32 ``[B]`` are places."""
    return {f"loss/{name}": jnp.mean(pair_losses, where=sources == place) for place, name in enumerate(names)}
