"""The training state, and functions that create the mesh, the model and the state of a config."""

import dataclasses
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

from clip_jax.losses import loss_type
from clip_jax.models.clip import CLIP, example_inputs
from clip_jax.models.execution import choose_execution
from clip_jax.models.presets import model_preset
from clip_jax.sharding import batch_sharding, choose_fsdp, make_mesh, state_sharding


class TrainState(NamedTuple):
    """Everything that a step changes: int32 ``step``, float32 ``params``, and the optimizer's state.

    ``batch_stats`` has the running averages of a ResNet's BatchNorm, and is empty for other models.
    """

    step: jax.Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState

    @property
    def variables(self) -> dict:
        """The variables for ``model.apply``."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def configured_mesh(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None, memory_bytes: float | None = None
) -> Mesh:
    """Returns the mesh of ``config.mesh``. If ``fsdp`` is 0, :func:`choose_fsdp` chooses it.

    Args:
      config: the whole config.
      devices: devices to compile for; None: all devices of this run.
      memory_bytes: memory of each of ``devices``.

    Raises:
      ValueError: ``fsdp`` does not divide the number of devices, or of a slice's devices.
    """
    if devices is None:
        devices = jax.devices()
        memory_bytes = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    fsdp = config.mesh.fsdp or choose_fsdp(_state_bytes(config), memory_bytes, devices)
    return make_mesh(fsdp, devices)


def _state_bytes(config: ml_collections.ConfigDict) -> int:
    """Returns the bytes of all parameters in float32, their gradients, and Adam's two moments."""
    params = jax.eval_shape(CLIP(model_preset(config)).init, jax.random.key(0), *example_inputs(model_preset(config)))
    count = sum(leaf.size for leaf in jax.tree.leaves(params["params"]))
    return count * (3 * 4 + jnp.dtype(config.optimizer.first_moment_dtype).itemsize)


def make_model(config: ml_collections.ConfigDict, mesh: Mesh) -> CLIP:
    """Returns the model of ``config.model``; the first axis of its activations is split over the mesh."""
    model, preset = config.model, model_preset(config)
    execution = choose_execution(
        mesh, preset.fused_head_widths, model.dtype, model.remat, model.scan_unroll, model.fused_attention
    )
    return CLIP(
        preset,
        execution,
        loss_type(config.loss).parameters,
    )


def _init_variables(model: CLIP, key: jax.Array) -> dict:
    """Returns new parameters and running averages, in boxes with their logical axes."""
    images, tokens = (jnp.zeros(array.shape, array.dtype) for array in example_inputs(model.preset))
    # One example cannot be split over devices.
    model = model.clone(execution=dataclasses.replace(model.execution, batch_sharding=None))
    return {"batch_stats": {}} | model.init(key, images, tokens)


def _state_of(variables: dict, optimizer: optax.GradientTransformation) -> TrainState:
    opt_state = optimizer.init(variables["params"])
    return TrainState(jnp.zeros((), jnp.int32), variables["params"], variables["batch_stats"], opt_state)


@functools.lru_cache(maxsize=4)  # tracing takes half a second, and the function keeps its trace
def _initializer(model: CLIP, optimizer: optax.GradientTransformation) -> Callable[[jax.Array], TrainState]:
    """Returns the function from a key to a new state, in boxes with its logical axes."""
    return jax.jit(lambda key: _state_of(_init_variables(model, key), optimizer))


def _abstract(init: Callable[[jax.Array], Any], mesh: Mesh):
    boxed = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        state_sharding(boxed, mesh),
    )


def abstract_variables(model: CLIP, mesh: Mesh) -> dict:
    """Returns shapes, dtypes and shardings of ``params`` and ``batch_stats``; computes no arrays."""
    return _abstract(lambda key: _init_variables(model, key), mesh)


def abstract_state(model: CLIP, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns shapes, dtypes and shardings of the state, for restoring and compiling; computes no arrays."""
    return _abstract(_initializer(model, optimizer), mesh)


def abstract_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch of one source, as the step takes it."""
    size, length = config.model.vision.image_size, config.model.text.context_length
    shapes = {"image": ((size, size, 3), np.uint8), "tokens": ((length,), np.int32)}
    if config.model.patch_dropout:
        shapes["seed"] = ((), np.uint32)
    return {
        name: jax.ShapeDtypeStruct((config.global_batch_size, *shape), dtype, sharding=batch_sharding(mesh))
        for name, (shape, dtype) in shapes.items()
    }


def create_state(model: CLIP, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """Returns a new state. Each device creates its own share, so no device needs memory for all of it."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))
    initializer = _initializer(model, optimizer)
    init = jax.jit(lambda key: nn.meta.unbox(initializer(key)), out_shardings=shardings)
    return init(jax.random.key(seed))


def place_variables(variables: dict, model: CLIP, mesh: Mesh) -> dict:
    """Copies numpy ``params`` and ``batch_stats``, complete on every host, to devices, sharded as the model's are."""

    def place(array: np.ndarray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: np.asarray(array[index], leaf.dtype)
        )

    return jax.tree.map(place, variables, abstract_variables(model, mesh))


def state_from_variables(
    variables: dict, model: CLIP, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns a new state, at step 0, with the given ``params`` and ``batch_stats``: see :func:`place_variables`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))
    create = jax.jit(lambda variables: _state_of(variables, optimizer), out_shardings=shardings)
    return create(place_variables(variables, model, mesh))
