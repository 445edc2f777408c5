"""Tests that embedding in padded batches on eight devices equals embedding one by one."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.data.tokenizer import tokenize
from clip_jax.evaluation.embedding import Embedder, batch_size_for
from clip_jax.models.clip import CLIP, normalize_images
from clip_jax.models.preprocessing import Preprocessing
from clip_jax.models.presets import CLIPPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.models.towers.vision_transformer import VisionTransformerPreset

PRESET = CLIPPreset(
    16,
    VisionTransformerPreset(image_size=16, patch_size=8, width=32, num_layers=1, num_heads=2),
    TextTransformerPreset(width=16, num_layers=1, num_heads=2, context_length=12),
)


@pytest.fixture(scope="module")
def model():
    return CLIP(PRESET)


@pytest.fixture(scope="module")
def variables_of(model):
    """A function from a seed to the variables of a new model."""
    init = jax.jit(model.init)

    @functools.cache
    def make(seed):
        return nn.meta.unbox(init(jax.random.key(seed), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 8), jnp.int32)))

    return make


@pytest.fixture(scope="module")
def one_by_one(model, variables_of):
    """A function from a method of the model and its inputs to its outputs for each input by itself."""
    apply = jax.jit(lambda inputs, method: model.apply(variables_of(0), inputs, method=method), static_argnums=1)
    return lambda method, inputs: np.concatenate([apply(row[None], method) for row in inputs])


@pytest.fixture(scope="module")
def embedder(model, variables_of, mesh_of):
    return Embedder(model, mesh_of((4, 2)), batch_size=13).set_variables(variables_of(0))  # not divisible by 8


def images_of(count):
    return np.random.default_rng(count).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("count", [1, 7, 16, 17, 37])
def test_any_number_of_images_embeds_as_one_by_one(one_by_one, embedder, count):
    images = images_of(count)
    result = embedder.encode_image(images)
    assert result.shape == (count, 16)
    assert result.dtype == np.float32
    expected = one_by_one("encode_image", normalize_images(images, Preprocessing()))
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-6)


def test_texts_embed_as_one_by_one_and_one_too_long_is_cut(one_by_one, embedder):
    texts = [f"image number {number}" for number in range(18)] + [
        "a word and more words than there is ever any room for here"
    ]
    result = embedder.encode_text(texts)
    expected = one_by_one("encode_text", tokenize(texts, 12, truncate=True))
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), 1, rtol=1e-6)
    assert np.abs(result[3] - result[4]).max() > 1e-4


def test_the_parameters_last_set_are_those_that_embed(variables_of, embedder):
    images = images_of(3)
    first = embedder.encode_image(images)
    assert np.abs(embedder.set_variables(variables_of(1)).encode_image(images) - first).max() > 1e-2
    np.testing.assert_array_equal(embedder.set_variables(variables_of(0)).encode_image(images), first)


def test_one_device_and_eight_embed_alike(model, variables_of, embedder, mesh_of):
    alone = Embedder(model, mesh_of((1, 1)), batch_size=4).set_variables(variables_of(0))
    images = images_of(9)
    np.testing.assert_allclose(alone.encode_image(images), embedder.encode_image(images), rtol=0, atol=2e-6)


def test_each_image_is_read_once(one_by_one, embedder):
    images, read = images_of(37), []

    class Images(Sequence):
        blank_image = images[0]

        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            read.append(index)
            return images[index]

    np.testing.assert_allclose(embedder.encode_image(Images()), embedder.encode_image(images), rtol=0, atol=2e-6)
    assert sorted(read) == list(range(37))


def test_features_are_the_input_of_the_projection(model, variables_of, embedder):
    images = images_of(5)
    features = embedder.image_features(images)
    assert features.shape == (5, 32) and features.dtype == np.float32
    projected = features @ np.asarray(variables_of(0)["params"]["vision"]["projection"]["kernel"])
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    np.testing.assert_allclose(projected, embedder.encode_image(images), rtol=0, atol=2e-6)


def test_texts_embed_alike_however_long_their_neighbors_are(embedder):
    alone = embedder.encode_text(["a cat"])
    beside = embedder.encode_text(["a cat", "a word and more words than there is ever any room for here"])
    np.testing.assert_allclose(alone[0], beside[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("largest", "devices"), [(64, 1), (64, 8), (16, 8), (8, 8), (1, 1), (1000, 4)])
def test_any_number_of_rows_takes_a_few_batch_sizes_and_at_most_doubles(largest, devices):
    sizes = {rows: batch_size_for(rows, largest, devices) for rows in range(1, 3 * largest)}
    assert len(set(sizes.values())) <= (3 if largest <= 64 else 4)
    assert sizes[1] <= 2 * devices and sizes[max(sizes)] == largest
    for rows, size in sizes.items():
        assert size % devices == 0 and size <= largest
        assert -(-rows // size) * size <= 2 * max(rows, devices)
