"""Patches that are left out of a Vision Transformer, and images of another size than its positions were made for."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.clip import CLIP
from clip_jax.models.execution import Execution
from clip_jax.models.presets import CLIPPreset
from clip_jax.models.towers.resnet import ResNetPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.models.towers.vision_transformer import VisionTransformerPreset
from clip_jax.weights.resizing import at_image_size

TEXT = TextTransformerPreset(width=8, num_layers=1, num_heads=1, context_length=4, vocab_size=16)


VIT = CLIPPreset(16, VisionTransformerPreset(32, 8, width=32, num_layers=2, num_heads=2), TEXT)


RESNET = CLIPPreset(16, ResNetPreset(96, 8, (1, 1, 1, 1), 4), TEXT)


def variables_of(preset: CLIPPreset) -> dict:
    size = preset.vision.image_size
    inputs = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 4), jnp.int32)
    return nn.meta.unbox(jax.jit(CLIP(preset).init)(jax.random.key(0), *inputs))


@pytest.fixture(scope="module")
def encode():
    """A function of images, the patches that are kept, and whether the class token is carried apart."""
    variables = variables_of(VIT)

    @functools.cache
    def program(apart):
        model = CLIP(VIT, Execution(class_token_apart=apart))
        return jax.jit(lambda images, kept: model.apply(variables, images, kept_patches=kept, method="encode_image"))

    def run(images, kept=None, apart=False):
        kept = None if kept is None else jnp.int32(kept)
        return program(apart)(jnp.float32(images), kept)

    return run


def make_images(size: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, size, size, 3))


def test_what_is_left_out_is_not_seen_and_what_is_kept_is(encode):
    images, kept = make_images(32), [[0, 5, 10], [3, 6, 15]]
    before = encode(images, kept)
    unseen, seen = images.copy(), images.copy()
    unseen[0, :8, 8:16] += 1  # patch 1
    seen[0, 8:16, 8:16] += 1  # patch 5
    np.testing.assert_array_equal(encode(unseen, kept), before)
    assert np.abs(encode(seen, kept) - before)[0].max() > 1e-3
    np.testing.assert_array_equal(encode(seen, kept)[1], before[1])


@pytest.mark.parametrize("apart", [False, True])
def test_to_keep_all_patches_is_to_leave_out_none(encode, apart):
    everything = np.tile(np.arange(16), (2, 1))
    np.testing.assert_allclose(encode(make_images(32), everything, apart), encode(make_images(32)), rtol=0, atol=1e-6)


def test_patches_left_out_with_the_class_token_apart_are_left_out_alike(encode):
    kept = [[0, 5, 10], [3, 6, 15]]
    np.testing.assert_allclose(
        encode(make_images(32), kept, apart=True), encode(make_images(32), kept), rtol=0, atol=1e-6
    )
    assert np.abs(encode(make_images(32), kept) - encode(make_images(32))).max() > 1e-3


@pytest.mark.parametrize(("preset", "size"), [(VIT, 16), (VIT, 40), (RESNET, 64)])
def test_images_of_another_size_are_embedded_as_by_a_model_made_for_that_size(preset, size):
    variables = variables_of(preset)
    other = dataclasses.replace(preset, vision=dataclasses.replace(preset.vision, image_size=size))
    images = jnp.float32(make_images(size))
    encode = functools.partial(jax.jit, static_argnames="method")
    expected = encode(CLIP(other).apply)(at_image_size(variables, preset, other), images, method="encode_image")
    result = encode(CLIP(preset).apply)(variables, images, method="encode_image")
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)
