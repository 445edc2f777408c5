"""Where arrays live: the device mesh, and one table from the model's logical axes to the mesh's."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")
STATE_SHARE = 1 / 4  # of a device's memory, for what does not grow with the batch

# Every parameter names its axes (``nn.with_logical_partitioning``); those not listed here are kept whole.
LOGICAL_AXIS_RULES = (
    ("embed", "fsdp"),
    ("vocab", None),
    ("position", None),
    ("patch", None),
    ("height", None),
    ("width", None),
    ("channels", None),
    ("qkv", None),
    ("heads", None),
    ("mlp", None),
    ("output", None),
    ("layers", None),
)


def make_mesh(fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices as ``("data", "fsdp")``: parameters are split over fsdp, the batch over both.

    Devices of several slices, which a data centre's network joins, are so arranged that only ``data`` crosses it: what
    travels for every layer stays within a slice.

    Args:
      fsdp: how many devices share one copy of the parameters.
      devices: instead of those that this process sees, for compiling for others.

    Raises:
      ValueError: fsdp does not divide the number of devices, or of a slice's devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if len(devices) % fsdp:
        raise ValueError(f"config.mesh.fsdp={fsdp} does not divide the {len(devices)} devices")
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    in_slice = len(devices) // num_slices
    if in_slice % fsdp:
        raise ValueError(f"config.mesh.fsdp={fsdp} does not divide the {in_slice} devices of a slice")
    auto = (AxisType.Auto,) * 2
    shape = (in_slice // fsdp, fsdp)
    # Splitting physical axes: jax.make_mesh, which doesn't, knows no fsdp of 2, 4 or 8 on 16 x 16 chips of v6e.
    if num_slices == 1:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        array = mesh_utils.create_hybrid_device_mesh(shape, (num_slices, 1), devices, allow_split_physical_axes=True)
    return Mesh(array, BATCH_AXES, axis_types=auto)


def choose_fsdp(state_bytes: float, memory_bytes: float | None, devices: Sequence[jax.Device]) -> int:
    """The fewest devices that, sharing one copy, each hold at most a quarter of their memory of it.

    Fewer copies cost no memory of their own, but parameters travel for every layer. Activations decide about the other
    three quarters; ``python -m clip_jax.plan --search=mesh`` tries what this rule can only guess.

    Args:
      state_bytes: of parameters, gradients and optimizer state.
      memory_bytes: of a device; None if it isn't known, as on CPU, where nothing is split.
      devices: those of the mesh; the number returned, a power of two as the parameters' sizes are divisible by,
        divides those of a slice.
    """
    if not memory_bytes:
        return 1
    in_slice = len(devices) // len({getattr(device, "slice_index", 0) for device in devices})
    fsdp = 1
    while state_bytes / fsdp > STATE_SHARE * memory_bytes and in_slice % (2 * fsdp) == 0:
        fsdp *= 2
    return fsdp


def check_batch_divides(global_batch_size: int, mesh: Mesh, accumulation_steps: int = 1) -> None:
    """Raises ValueError, with the nearest sizes that fit, if the batch cannot be shared out evenly."""
    unit = mesh.size * accumulation_steps
    if global_batch_size % unit:
        below = global_batch_size // unit * unit
        near = " or ".join(str(size) for size in (below, below + unit) if size)
        steps = f" in {accumulation_steps} steps" if accumulation_steps > 1 else ""
        raise ValueError(
            f"config.global_batch_size={global_batch_size} cannot be divided among {mesh.size} devices{steps}; "
            f"{near} can"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(abstract_state, mesh: Mesh):
    """Shardings for a state of logically partitioned boxes, as ``jax.eval_shape`` gives it.

    An axis that the mesh cannot divide evenly is kept whole.
    """
    specs = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract_state), mesh, LOGICAL_AXIS_RULES)

    def fit(leaf, sharding):
        spec = tuple(
            axis if axis is None or size % mesh.shape[axis] == 0 else None
            for size, axis in zip(leaf.shape, tuple(sharding.spec), strict=False)
        )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(fit, nn.meta.unbox(abstract_state), specs)


def to_global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's ``[B / hosts, ...]`` arrays as part of global ``[B, ...]`` arrays split over all devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
