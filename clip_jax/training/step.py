"""One training step: uint8 images and tokens in, a new state and metrics out, as one program over the mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from clip_jax.config import model_preset
from clip_jax.models.clip import CLIP, MAX_LOGIT_SCALE, example_inputs, normalize_images
from clip_jax.training.accumulation import loss_and_gradients
from clip_jax.training.loss import BLOCK_SIZE, choose_form, contrastive_loss
from clip_jax.training.sharding import batch_sharding, replicated, state_sharding


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


TrainStep = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_model(config: ml_collections.ConfigDict, mesh: Mesh) -> CLIP:
    """The model that ``config.model`` describes, its activations split over the mesh by their first axis."""
    model = config.model
    return CLIP(
        model_preset(config),
        remat=model.remat,
        scan_unroll=model.scan_unroll,
        class_token_apart=mesh.devices.flat[0].platform == "tpu",
        dtype=jnp.dtype(model.dtype),
        batch_sharding=batch_sharding(mesh),
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
    model: CLIP,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    loss_form: str = "auto",
    loss_block_size: int = BLOCK_SIZE,
    accumulation_steps: int = 1,
) -> TrainStep:
    """Returns ``step(state, images, tokens) -> (state, metrics)``, jitted over the mesh; the old state is donated.

    ``images`` are uint8 ``[B, H, W, 3]``, ``tokens`` int32 ``[B, L]``, both split over all devices. Metrics are
    float32 scalars: loss, both accuracies within the batch, logit_scale (as multiplied) and gradient_norm. With
    ``accumulation_steps`` activations are of that part of the batch at a time (:mod:`clip_jax.training.accumulation`).
    """
    batch = batch_sharding(mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))

    def embed(params, batch_stats, images, tokens):
        outputs, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            normalize_images(images),
            tokens,
            train=True,
            mutable=["batch_stats"],
        )
        return outputs, updated.get("batch_stats", {})

    def loss(image_embeddings, text_embeddings, logit_scale):
        form = choose_form(len(image_embeddings), mesh.size) if loss_form == "auto" else loss_form
        return contrastive_loss(image_embeddings, text_embeddings, logit_scale, mesh, form, loss_block_size)

    def train_step(state: TrainState, images: jax.Array, tokens: jax.Array):
        value, metrics, gradients, batch_stats = loss_and_gradients(
            embed, loss, state.params, state.batch_stats, images, tokens, accumulation_steps, mesh
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
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
        in_shardings=(shardings, batch, batch),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
