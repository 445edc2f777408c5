"""Where arrays live: the device mesh, and one table from the model's logical axes to the mesh's."""

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")

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


def make_mesh(fsdp: int) -> Mesh:
    """All devices as ``("data", "fsdp")``: parameters are split over fsdp, the batch over both.

    Raises:
      ValueError: fsdp does not divide the number of devices.
    """
    devices = jax.device_count()
    if devices % fsdp:
        raise ValueError(f"config.mesh.fsdp={fsdp} does not divide the {devices} devices")
    return jax.make_mesh((devices // fsdp, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def check_batch_divides(global_batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError, with the nearest sizes that fit, if the batch cannot be shared out evenly."""
    devices = mesh.size
    if global_batch_size % devices:
        below = global_batch_size // devices * devices
        near = " or ".join(str(size) for size in (below, below + devices) if size)
        raise ValueError(
            f"config.global_batch_size={global_batch_size} cannot be divided among {devices} devices; {near} can"
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
