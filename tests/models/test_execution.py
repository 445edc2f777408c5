"""Which form of the same function a kind of device gets."""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.config import default_config, validate
from clip_jax.models.execution import REMAT_POLICIES, choose_execution
from clip_jax.models.layers import row_major
from clip_jax.models.presets import PRESETS, get_preset
from clip_jax.training.state import make_model

CPU, TPU = SimpleNamespace(platform="cpu"), SimpleNamespace(platform="tpu")
H200, V100, MI300X = (
    SimpleNamespace(platform="gpu", compute_capability=capability) for capability in ("9.0", "7.0", "gfx942")
)
OTHERS = (CPU, V100, MI300X)


def chosen(device, preset, *settings):
    """The execution on a mesh of one such device."""
    mesh = SimpleNamespace(devices=np.array([device]), size=1)
    with mock.patch("clip_jax.models.execution.batch_sharding", return_value=None):
        return choose_execution(mesh, preset.fused_head_widths, *settings)


@pytest.mark.parametrize("name", PRESETS)
def test_published_models_have_fused_attention_on_a_recent_gpu_and_the_class_token_apart_on_a_tpu(name):
    for device, apart, fused in ((H200, False, True), (TPU, True, False), *((d, False, False) for d in OTHERS)):
        result = chosen(device, get_preset(name), "bfloat16")
        assert (result.class_token_apart, result.fused_attention) == (apart, fused)
        assert result.row_major == (device.platform == "gpu")
        assert result.merge_leading_axes == (device == CPU)
        assert result.sums_by_product == (device != CPU)


def test_attention_is_not_fused_where_cudnn_cannot_or_it_is_not_wanted():
    preset = get_preset("ViT-B/32")
    assert not chosen(H200, preset, "float32").fused_attention
    assert not chosen(H200, preset, "bfloat16", "none", 0, False).fused_attention
    for tower in ("vision", "text"):
        for num_heads in (2, 128):  # heads of 256 or more, and of 4 or 6
            changed = dataclasses.replace(getattr(preset, tower), num_heads=num_heads)
            other = dataclasses.replace(preset, **{tower: changed})
            assert not chosen(H200, other, "bfloat16").fused_attention


def test_a_gpus_layers_stand_in_one_step_where_the_backward_pass_finds_their_products():
    preset = get_preset("ViT-B/32")
    unrolled = {remat: chosen(H200, preset, "bfloat16", remat).scan_unroll > 100 for remat in REMAT_POLICIES}
    assert unrolled == {"none": True, "lite": True, "attention": False, "full": False}
    for device in (CPU, TPU):
        assert {chosen(device, preset, "bfloat16", remat).scan_unroll for remat in REMAT_POLICIES} == {1}
    assert chosen(H200, preset, "bfloat16", "none", 3).scan_unroll == 3


def test_the_config_can_say_otherwise(mesh_of):
    config = default_config("ViT-tiny")
    config.data.source = "emoji:noto/train"
    validate(config)
    assert make_model(config, mesh_of((1, 1))).execution.scan_unroll == 1
    config.model.scan_unroll = 3
    config.model.fused_attention = False
    validate(config)
    result = make_model(config, mesh_of((1, 1))).execution
    assert (result.scan_unroll, result.fused_attention) == (3, False)
    config.model.scan_unroll = config.loss.block_size = -1
    with pytest.raises(ValueError, match="must not be negative") as error:
        validate(config)
    assert len(str(error.value).splitlines()) == 2


def test_a_layout_changes_neither_values_nor_gradients():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    value, backward = jax.vjp(jax.jit(row_major), x)
    np.testing.assert_array_equal(value, x)
    np.testing.assert_array_equal(backward(x)[0], x)
