"""Where arrays come to lie, on eight virtual devices."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from clip_jax.sharding import (
    batch_sharding,
    check_batch_divides,
    choose_fsdp,
    make_mesh,
    replicated,
    state_sharding,
    to_global_batch,
)


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_the_mesh_has_all_devices_and_fsdp_of_them_share_a_copy(fsdp):
    mesh = make_mesh(fsdp)
    assert dict(mesh.shape) == {"data": 8 // fsdp, "fsdp": fsdp}
    assert set(mesh.devices.flat) == set(jax.devices())


def test_an_fsdp_that_does_not_divide_the_devices_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"config\.mesh\.fsdp=3 .* 8 devices"):
        make_mesh(3)


class SliceDevice:
    """What arranging a mesh asks of a device: where it is."""

    platform, device_kind = "cpu", "cpu"

    def __init__(self, index, slice_index):
        self.id, self.slice_index, self.process_index = index, slice_index, index // 2


def test_between_slices_only_the_data_axis_lies():
    devices = [SliceDevice(index, slice_index=index % 2) for index in range(8)]
    mesh = make_mesh(2, devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2}
    assert {device.id for device in mesh.devices.flat} == set(range(8))
    assert all(len({device.slice_index for device in row}) == 1 for row in mesh.devices)
    with pytest.raises(ValueError, match=r"config\.mesh\.fsdp=8 .* 4 devices of a slice"):
        make_mesh(8, devices)


def test_as_many_devices_share_a_copy_as_bring_it_under_a_quarter_of_their_memory():
    devices = [SliceDevice(index, slice_index=0) for index in range(24)]
    assert [choose_fsdp(state, 100, devices) for state in (10, 25, 26, 70, 100, 160, 10_000)] == [1, 1, 2, 4, 4, 8, 8]
    assert choose_fsdp(10_000, None, devices) == 1  # on CPU
    two_slices = [SliceDevice(index, slice_index=index % 2) for index in range(8)]
    assert choose_fsdp(10_000, 100, two_slices) == 4


def test_a_batch_in_parts_must_divide_by_their_number_as_well(mesh_of):
    check_batch_divides(32, mesh_of((4, 2)), accumulation_steps=2)
    with pytest.raises(ValueError, match=r"=24 .* 8 devices in 2 steps; 16 or 32 can"):
        check_batch_divides(24, mesh_of((4, 2)), accumulation_steps=2)


def test_a_batch_that_cannot_be_shared_out_is_refused_with_the_nearest_that_can(mesh_of):
    check_batch_divides(24, mesh_of((4, 2)))
    with pytest.raises(ValueError, match=r"config\.global_batch_size=20 .* 8 devices; 16 or 24 can"):
        check_batch_divides(20, mesh_of((4, 2)))
    with pytest.raises(ValueError, match=r"devices; 8 can"):
        check_batch_divides(5, mesh_of((4, 2)))


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_a_batch_is_split_in_its_order_over_all_devices(mesh_of, shape):
    mesh = mesh_of(shape)
    batch = {"images": np.arange(16 * 6).reshape(16, 2, 3), "tokens": np.arange(16)[:, None]}
    result = to_global_batch(batch, mesh)
    for name, array in batch.items():
        np.testing.assert_array_equal(result[name], array)
        assert result[name].sharding == batch_sharding(mesh)
        shards = {shard.device: shard.data for shard in result[name].addressable_shards}
        for index, device in enumerate(mesh.devices.flat):
            np.testing.assert_array_equal(shards[device], array[2 * index : 2 * index + 2])


def test_replicated_means_whole_on_every_device(mesh_of):
    array = jax.device_put(jnp.arange(6), replicated(mesh_of((2, 4))))
    assert [shard.data.shape for shard in array.addressable_shards] == [(6,)] * 8


def box(shape, names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@pytest.mark.parametrize(
    ("shape", "names", "expected"),
    [
        ((4, 8, 24), ("layers", "embed", "qkv"), (None, "fsdp", None)),
        ((4, 8), ("mlp", "embed"), (None, "fsdp")),
        ((8,), ("embed",), ("fsdp",)),
        ((8,), ("mlp",), (None,)),
        ((6,), ("embed",), (None,)),  # 4 doesn't divide 6
        ((8, 6), ("vocab", "embed"), (None, None)),
    ],
)
def test_the_embed_axis_is_split_over_fsdp_where_that_divides_it(mesh_of, shape, names, expected):
    sharding = state_sharding({"a": box(shape, names)}, mesh_of((2, 4)))["a"]
    spec = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
    assert PartitionSpec(*spec) == PartitionSpec(*expected)


def test_what_names_no_axes_is_whole_on_every_device(mesh_of):
    sharding = state_sharding({"step": jax.ShapeDtypeStruct((), jnp.int32)}, mesh_of((2, 4)))["step"]
    assert sharding.is_fully_replicated


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX knows of a chip of v6e's that is not here."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0
    slice_index: int = 0
    process_index: int = 0


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8, 16, 32])
def test_any_power_of_two_of_chips_shares_a_copy_and_they_are_neighbors(fsdp):
    chips = [Chip(16 * y + x, (x, y, 0)) for y in range(16) for x in range(16)]
    mesh = make_mesh(fsdp, chips)
    assert dict(mesh.shape) == {"data": 256 // fsdp, "fsdp": fsdp}
    assert set(mesh.devices.flat) == set(chips)
    for row in mesh.devices:
        width, height = (len({chip.coords[axis] for chip in row}) for axis in (0, 1))
        assert width * height == fsdp
