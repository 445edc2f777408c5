"""Which form of the same function a kind of device gets."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.config import REMAT_POLICIES, default_config, validate
from clip_jax.models.backends import backend_of
from clip_jax.models.layers import row_major
from clip_jax.models.presets import PRESETS, get_preset
from clip_jax.training.state import make_model

CPU, TPU = SimpleNamespace(platform="cpu"), SimpleNamespace(platform="tpu")
H200, V100, MI300X = (
    SimpleNamespace(platform="gpu", compute_capability=capability) for capability in ("9.0", "7.0", "gfx942")
)


@pytest.mark.parametrize("name", PRESETS)
def test_published_models_have_fused_attention_on_a_recent_gpu_and_the_class_token_apart_on_a_tpu(name):
    preset = get_preset(name)
    apart, fused = "class_token_apart", "fused_attention"
    assert backend_of(H200).model_options(preset, jnp.bfloat16) == {apart: False, fused: True}
    assert backend_of(TPU).model_options(preset, jnp.bfloat16) == {apart: True, fused: False}
    for device in (CPU, V100, MI300X):
        assert backend_of(device).model_options(preset, jnp.bfloat16) == {apart: False, fused: False}


def test_attention_is_not_fused_where_cudnn_cannot_or_it_is_not_wanted():
    preset = get_preset("ViT-B/32")
    assert not backend_of(H200).model_options(preset, jnp.float32)["fused_attention"]
    assert not backend_of(H200).model_options(preset, jnp.bfloat16, fused_attention=False)["fused_attention"]
    for tower in ("vision", "text"):
        for num_heads in (2, 128):  # heads of 256 or more, and of 4 or 6
            changed = dataclasses.replace(getattr(preset, tower), num_heads=num_heads)
            other = dataclasses.replace(preset, **{tower: changed})
            assert not backend_of(H200).model_options(other, jnp.bfloat16)["fused_attention"]


def test_a_gpus_layers_stand_in_one_step_where_the_backward_pass_finds_their_products():
    unrolled = {remat: backend_of(H200).scan_unroll(remat) > 100 for remat in REMAT_POLICIES}
    assert unrolled == {"none": True, "lite": True, "attention": False, "full": False}
    for device in (CPU, TPU):
        assert {backend_of(device).scan_unroll(remat) for remat in REMAT_POLICIES} == {1}


def test_the_config_can_say_otherwise(mesh_of):
    config = default_config("ViT-tiny")
    config.data.source = "emoji:noto/train"
    validate(config)
    assert make_model(config, mesh_of((1, 1))).scan_unroll == 1
    config.model.scan_unroll = 3
    config.model.fused_attention = False
    validate(config)
    model = make_model(config, mesh_of((1, 1)))
    assert (model.scan_unroll, model.fused_attention) == (3, False)
    config.model.scan_unroll = config.loss.block_size = -1
    with pytest.raises(ValueError, match="must not be negative") as error:
        validate(config)
    assert len(str(error.value).splitlines()) == 2


def test_a_layout_changes_neither_values_nor_gradients():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    value, backward = jax.vjp(jax.jit(row_major), x)
    np.testing.assert_array_equal(value, x)
    np.testing.assert_array_equal(backward(x)[0], x)
