"""How arrays are split over devices: the mesh, and a table from the model's logical axes to the mesh's axes."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clip_jax.settings import may_change, must_not_be_negative

BATCH_AXES = ("data", "fsdp")
STATE_SHARE = 1 / 4  # of a device's memory, for arrays that do not grow with the batch

# Every parameter names its axes (``nn.with_logical_partitioning``). An axis that is not listed here is not split.
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


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Defaults of ``config.mesh``."""

    fsdp: int = may_change(0)  # devices that share one copy of the parameters; 0: by the model and a device's memory

    def problems(self) -> list[str]:
        """Returns one line for each invalid value."""
        return must_not_be_negative(self, ("fsdp",), "config.mesh")


def make_mesh(fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of all devices with axes ``("data", "fsdp")``.

    Parameters are split over fsdp, the batch over both axes. With several slices, which a data center's network
    connects, only ``data`` spans slices: parameters, which are sent for every layer, stay within a slice.

    Args:
      fsdp: how many devices share one copy of the parameters.
      devices: devices to compile for; None: all devices of this run.

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
    # Not jax.make_mesh: it does not split physical axes, and so has no fsdp of 2, 4 or 8 on 16 x 16 chips of v6e.
    if num_slices == 1:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        array = mesh_utils.create_hybrid_device_mesh(shape, (num_slices, 1), devices, allow_split_physical_axes=True)
    return Mesh(array, BATCH_AXES, axis_types=auto)


def choose_fsdp(state_bytes: float, memory_bytes: float | None, devices: Sequence[jax.Device]) -> int:
    """Returns the fewest devices to share one copy of the state, so that each share is a quarter of memory at most.

    More devices per copy need less memory, but send parameters for every layer. The rest of the memory is for
    activations, which this rule does not know; ``python -m clip_jax.plan --search=mesh`` compiles and compares.

    Args:
      state_bytes: bytes of parameters, gradients and optimizer state.
      memory_bytes: bytes of a device; None if unknown, as on CPU: the result is then 1.
      devices: of the mesh.

    Returns:
      A power of two, as it divides the sizes of parameters, that also divides the number of devices in a slice.
    """
    if not memory_bytes:
        return 1
    in_slice = len(devices) // len({getattr(device, "slice_index", 0) for device in devices})
    fsdp = 1
    while state_bytes / fsdp > STATE_SHARE * memory_bytes and in_slice % (2 * fsdp) == 0:
        fsdp *= 2
    return fsdp


def check_batch_divides(global_batch_size: int, mesh: Mesh, accumulation_steps: int = 1) -> None:
    """Raises ValueError, with the nearest valid sizes, if the batch cannot be divided evenly."""
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
    """Returns the sharding of an array whose first axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(abstract_state, mesh: Mesh):
    """Returns shardings for the logically partitioned boxes of a state, as ``jax.eval_shape`` returns it.

    An axis that the mesh does not divide evenly is not split.
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
    """Returns global arrays ``[B, ...]`` over all devices, from this host's ``[B / hosts, ...]``."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
