"""Saves or restores a small state as one process of a pod: ``pod_checkpoint.py save|restore FOLDER DATA FSDP``."""

import logging
import os
import pathlib
import sys

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clip_jax import saved_arrays
from clip_jax.training.checkpoint import Checkpointer
from clip_jax.training.state import TrainState

STEPS = (1, 2)
# Shape, dtype and split of each array. Most are too long for orbax to store them in its index.
ARRAYS = TrainState(
    ((), np.int32, PartitionSpec()),
    {
        "columns": ((60, 800), np.float32, PartitionSpec(None, "fsdp")),
        "rows": ((160, 400), np.float32, PartitionSpec("fsdp")),
        "whole": ((80, 500), np.float32, PartitionSpec()),
        "scale": ((), np.float32, PartitionSpec()),
    },
    {},
    (((800, 30), np.float32, PartitionSpec("fsdp")),),
)


def is_array(leaf: object) -> bool:
    return isinstance(leaf, tuple) and len(leaf) == 3 and isinstance(leaf[2], PartitionSpec)


def values(step: int) -> TrainState:
    rng = np.random.default_rng(step)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf[0]).astype(leaf[1]) if leaf[1] == np.float32 else leaf[1](step),
        ARRAYS,
        is_leaf=is_array,
    )


def main(action: str, folder: str, data: int, fsdp: int) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf[0], leaf[1], sharding=NamedSharding(mesh, leaf[2])),
        ARRAYS,
        is_leaf=is_array,
    )
    saved_arrays.ARRAY_OPTIONS["min_slice_bytes_for_replica_parallel"] = 0  # hosts with the same array share its save
    checkpointer = Checkpointer(pathlib.Path(folder), 9, lambda step: 16 * step)
    if action == "save":
        for step in STEPS:
            state = jax.tree.map(
                lambda leaf, value: jax.make_array_from_callback(
                    leaf.shape, leaf.sharding, lambda index: np.asarray(value)[index]
                ),
                template,
                values(step),
            )
            checkpointer.save(step, state, 16 * step, "the-data")
            checkpointer.wait()
    else:
        state = checkpointer.restore_latest(template).state
        step = int(state.step)
        for array, expected in zip(jax.tree.leaves(state), jax.tree.leaves(values(step)), strict=True):
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(expected)[shard.index])
        print(f"restored {step}", flush=True)
    checkpointer.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("clip_jax").setLevel(logging.WARNING)
    if "JAX_NUM_PROCESSES" in os.environ:
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        address, processes, index = (os.environ[name] for name in names)
        jax.distributed.initialize(address, int(processes), int(index))
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
