"""One training step: uint8 images and tokens in, a new state and metrics out, as one program over the mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from clip_jax.config import model_preset
from clip_jax.data.sources import source_names
from clip_jax.models.backends import backend_of
from clip_jax.models.clip import (
    CLIP,
    MAX_LOGIT_SCALE,
    SIGMOID_INITIAL_LOGIT_BIAS,
    SIGMOID_INITIAL_LOGIT_SCALE,
    example_inputs,
    normalize_images,
)
from clip_jax.models.vision_transformer import choose_patches
from clip_jax.training.accumulation import loss_and_gradients
from clip_jax.training.loss import choose_form, contrastive_loss, sigmoid_loss
from clip_jax.training.sharding import batch_sharding, choose_fsdp, make_mesh, replicated, state_sharding


class TrainState(NamedTuple):
    """All that a step changes: int32 ``step``, float32 ``params``, and the optimizer's state over them.

    ``batch_stats`` holds the running averages of a ResNet's BatchNorm, and is empty without one.
    """

    step: jax.Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState

    @property
    def variables(self) -> dict:
        """What the model is applied with."""
        return {"params": self.params, "batch_stats": self.batch_stats}


TrainStep = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def configured_mesh(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None, memory_bytes: float | None = None
) -> Mesh:
    """The mesh of ``config.mesh``; with ``fsdp`` 0 the model and a device's memory decide (:func:`choose_fsdp`).

    Args:
      config: the whole config.
      devices: instead of those that this process sees, for compiling for others.
      memory_bytes: of each of them.

    Raises:
      ValueError: ``fsdp`` does not divide the number of devices, or of a slice's devices.
    """
    if devices is None:
        devices = jax.devices()
        memory_bytes = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    fsdp = config.mesh.fsdp or choose_fsdp(_state_bytes(config), memory_bytes, devices)
    return make_mesh(fsdp, devices)


def _state_bytes(config: ml_collections.ConfigDict) -> int:
    """Of all parameters in float32, their gradients, and Adam's two moments."""
    params = jax.eval_shape(CLIP(model_preset(config)).init, jax.random.key(0), *example_inputs(model_preset(config)))
    count = sum(leaf.size for leaf in jax.tree.leaves(params["params"]))
    return count * (3 * 4 + jnp.dtype(config.optimizer.first_moment_dtype).itemsize)


def make_model(config: ml_collections.ConfigDict, mesh: Mesh) -> CLIP:
    """The model that ``config.model`` describes, its activations split over the mesh by their first axis."""
    model, preset = config.model, model_preset(config)
    backend = backend_of(mesh.devices.flat[0])
    sigmoid = {
        "initial_logit_scale": SIGMOID_INITIAL_LOGIT_SCALE,
        "initial_logit_bias": SIGMOID_INITIAL_LOGIT_BIAS,
    }
    return CLIP(
        preset,
        remat=model.remat,
        scan_unroll=model.scan_unroll or backend.scan_unroll(model.remat),
        dtype=jnp.dtype(model.dtype),
        batch_sharding=batch_sharding(mesh),
        **backend.model_options(preset, model.dtype, model.fused_attention),
        **(sigmoid if config.loss.kind == "sigmoid" else {}),
    )


def _init_variables(model: CLIP, key: jax.Array) -> dict:
    """New parameters and running averages, still in boxes that carry their logical axes."""
    images, tokens = (jnp.zeros(array.shape, array.dtype) for array in example_inputs(model.preset))
    # One example cannot be split over devices.
    return {"batch_stats": {}} | model.clone(batch_sharding=None).init(key, images, tokens)


def _state_of(variables: dict, optimizer: optax.GradientTransformation) -> TrainState:
    opt_state = optimizer.init(variables["params"])
    return TrainState(jnp.zeros((), jnp.int32), variables["params"], variables["batch_stats"], opt_state)


def _init_state(model: CLIP, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    return _state_of(_init_variables(model, key), optimizer)


def _abstract(init: Callable[[jax.Array], Any], mesh: Mesh):
    boxed = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        state_sharding(boxed, mesh),
    )


def abstract_variables(model: CLIP, mesh: Mesh) -> dict:
    """Shapes, dtypes and shardings of ``params`` and ``batch_stats``, with nothing computed."""
    return _abstract(lambda key: _init_variables(model, key), mesh)


@functools.lru_cache(maxsize=4)  # a training asks three times, and tracing the initialization takes a second
def abstract_state(model: CLIP, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, with nothing computed: what restoring and compiling need."""
    return _abstract(lambda key: _init_state(model, optimizer, key), mesh)


def create_state(model: CLIP, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """A new state, created where it will live: no device ever holds all of it."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))
    init = jax.jit(lambda key: nn.meta.unbox(_init_state(model, optimizer, key)), out_shardings=shardings)
    return init(jax.random.key(seed))


def place_variables(variables: dict, model: CLIP, mesh: Mesh) -> dict:
    """Moves numpy ``params`` and ``batch_stats``, which every host has in full, to where the model has them."""

    def place(array: np.ndarray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: np.asarray(array[index], leaf.dtype)
        )

    return jax.tree.map(place, variables, abstract_variables(model, mesh))


def state_from_variables(
    variables: dict, model: CLIP, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """A new state, at step 0, around given ``params`` and ``batch_stats``, as :func:`place_variables` takes them."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))
    create = jax.jit(lambda variables: _state_of(variables, optimizer), out_shardings=shardings)
    return create(place_variables(variables, model, mesh))


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
            num_patches = (batch["image"].shape[1] // config.model.vision.patch_size) ** 2
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
