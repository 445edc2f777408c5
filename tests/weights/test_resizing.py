"""An image tower's positions at another size: what open_clip makes of them, and nothing else changes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from goldens import MODELS, flat

from clip_jax.models.positions import resize_positions
from clip_jax.models.presets import PRESETS
from clip_jax.weights import WeightsError, read_weights
from clip_jax.weights.resizing import at_image_size

WIDTH = 5


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.5."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resizing_matrix(before: int, after: int) -> np.ndarray:
    """Float64 ``[after, before]``: bicubic, widened where it scales down, normalized where it meets an edge."""
    scale = before / after
    centers = (np.arange(after) + 0.5) * scale - 0.5
    weights = cubic((np.arange(before) - centers[:, None]) / max(scale, 1))
    return weights / weights.sum(axis=1, keepdims=True)


def positions_of(side: int) -> np.ndarray:
    return np.random.default_rng(side).normal(size=(1 + side * side, WIDTH)).astype(np.float32)


@pytest.mark.parametrize(("before", "after"), [(7, 12), (2, 3), (1, 4), (16, 24), (24, 16), (12, 7), (9, 2), (4, 1)])
def test_positions_are_resized_by_antialiased_bicubic_interpolation(before, after):
    positions = positions_of(before)
    matrix = resizing_matrix(before, after)
    grid = np.float64(positions[1:]).reshape(before, before, WIDTH)
    expected = np.einsum("ij,kl,jlw->ikw", matrix, matrix, grid).reshape(-1, WIDTH)
    actual = resize_positions(positions, after)
    assert actual.shape == (1 + after * after, WIDTH)
    np.testing.assert_allclose(actual[1:], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32", jnp.bfloat16])
def test_the_first_position_and_the_dtype_are_kept(dtype):
    positions = positions_of(7).astype(dtype)
    for side in (5, 7, 11):
        resized = resize_positions(positions, side)
        assert resized.dtype == positions.dtype
        assert resized[0].tobytes() == positions[0].tobytes()


@pytest.mark.parametrize("side", [1, 7])
def test_the_same_size_changes_nothing(side):
    np.testing.assert_allclose(resize_positions(positions_of(side), side), positions_of(side), rtol=0, atol=1e-6)


def test_positions_that_are_all_alike_stay_so():
    positions = np.full((1 + 7 * 7, WIDTH), np.float32(3))
    for side in (1, 3, 10):
        np.testing.assert_allclose(resize_positions(positions, side), 3, rtol=1e-6)


def test_rows_and_columns_are_not_exchanged():
    rows = np.repeat(np.arange(4), 4)
    positions = np.float32(np.stack([rows, np.tile(np.arange(4), 4)], axis=1))
    resized = resize_positions(np.concatenate([np.zeros((1, 2), np.float32), positions]), 8)[1:].reshape(8, 8, 2)
    assert (np.diff(resized[:, :, 0], axis=0) > 0).all()
    assert np.abs(np.diff(resized[:, :, 0], axis=1)).max() < 1e-5
    np.testing.assert_allclose(resized[:, :, 1], resized[:, :, 0].T, atol=1e-6)


def with_vision(preset, **changes):
    return dataclasses.replace(preset, vision=dataclasses.replace(preset.vision, **changes))


@pytest.mark.parametrize(
    ("name", "size", "leaf", "side"),
    [
        ("openai_vit/float16", 40, "params.vision.positional_embedding", 5),
        ("openai_vit/float32", 16, "params.vision.positional_embedding", 2),
        ("openai_resnet/float32", 96, "params.vision.attention_pool.positional_embedding", 3),
        ("openai_resnet/float16", 32, "params.vision.attention_pool.positional_embedding", 1),
    ],
)
def test_another_image_size_changes_the_positions_alone(goldens, name, size, leaf, side):
    weights = read_weights(goldens[name].path)
    before = flat(weights.variables)
    copies = {path: array.copy() for path, array in before.items()}
    after = flat(at_image_size(weights.variables, weights.preset, with_vision(weights.preset, image_size=size)))
    assert after.keys() == before.keys()
    np.testing.assert_array_equal(after[leaf], resize_positions(before[leaf], side))
    assert after[leaf].shape == (1 + side * side, before[leaf].shape[1])
    for path, array in before.items():
        assert path == leaf or after[path] is array or after[path].tobytes() == array.tobytes()
        np.testing.assert_array_equal(array, copies[path])  # what was given is not changed


def test_the_same_image_size_gives_the_same_variables(goldens):
    for name in ("openai_vit/float32", "openai_resnet/float32"):
        weights = read_weights(goldens[name].path)
        assert at_image_size(weights.variables, weights.preset, weights.preset) is weights.variables


def test_how_batch_norm_trains_may_differ(goldens):
    weights = read_weights(goldens["openai_resnet/float32"].path)
    wanted = with_vision(weights.preset, batch_norm="per_device")
    assert at_image_size(weights.variables, weights.preset, wanted) is weights.variables


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"patch_size": 4}, ["vision.patch_size is 8 there and 4 here"]),
        ({"width": 64, "num_layers": 3}, ["vision.width is 128 there and 64 here", "vision.num_layers"]),
        ({"num_heads": 4}, ["vision.num_heads is 2 there and 4 here"]),
        ({"activation": "gelu"}, ["vision.activation is quick_gelu there and gelu here"]),
        ({"mlp_ratio": 2.0}, ["vision.mlp_ratio is 4.0 there and 2.0 here"]),
    ],
)
def test_any_other_difference_is_refused_by_name(change, named):
    preset = MODELS["openai_vit/float32"].preset
    with pytest.raises(WeightsError) as refusal:
        at_image_size({}, preset, with_vision(preset, image_size=48, **change))
    assert all(name in str(refusal.value) for name in named)
    assert "image_size" not in str(refusal.value)


def test_differences_of_the_text_tower_and_between_kinds_of_towers_are_refused():
    preset = PRESETS["ViT-B/16"]
    text = dataclasses.replace(preset, text=dataclasses.replace(preset.text, context_length=24))
    with pytest.raises(WeightsError, match=r"text\.context_length is 77 there and 24 here$"):
        at_image_size({}, preset, text)
    with pytest.raises(WeightsError, match=r"embed_dim is 512 there and 256 here$"):
        at_image_size({}, preset, dataclasses.replace(preset, embed_dim=256))
    with pytest.raises(WeightsError, match=r"vision\.patch_size is 16 there and None here.*vision\.stage_sizes"):
        at_image_size({}, preset, PRESETS["RN50"])
