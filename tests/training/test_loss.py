"""The sharded loss against figure 3 of the paper, written in float64 numpy with the gradients by hand."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.training.loss import contrastive_loss
from clip_jax.training.sharding import batch_sharding

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (8, 1), (4, 2), (2, 4), (1, 8)]


def log_softmax(x, axis):
    x = x - x.max(axis=axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))


def reference(images, texts, logit_scale):
    """Loss, gradients by images, texts and logit_scale, and both accuracies."""
    count = len(images)
    logits = math.exp(logit_scale) * images @ texts.T
    by_row, by_column = log_softmax(logits, 1), log_softmax(logits, 0)
    loss = -(np.trace(by_row) + np.trace(by_column)) / (2 * count)
    of_logits = (np.exp(by_row) + np.exp(by_column)) / (2 * count) - np.eye(count) / count
    scaled = math.exp(logit_scale) * of_logits
    gradients = scaled @ texts, scaled.T @ images, (of_logits * logits).sum()
    accuracies = [(logits.argmax(axis) == np.arange(count)).mean() for axis in (1, 0)]
    return loss, gradients, accuracies


def embeddings(count, width, alike=0.7, seed=0):
    """Unit vectors; each text resembles its image."""
    random = np.random.default_rng(seed)
    images = random.normal(size=(count, width))
    texts = alike * images + random.normal(size=(count, width))
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts)]


def compile_loss(mesh):
    return jax.jit(jax.value_and_grad(lambda *a: contrastive_loss(*a, mesh), argnums=(0, 1, 2), has_aux=True))


def on_devices(mesh, images, texts, logit_scale):
    rows = [jax.device_put(jnp.float32(x), batch_sharding(mesh)) for x in (images, texts)]
    return *rows, jnp.float32(logit_scale)


@pytest.mark.parametrize("shape", MESHES)
def test_loss_gradients_and_accuracies_are_those_of_the_paper_on_every_mesh(mesh_of, shape):
    mesh = mesh_of(shape)
    compiled = compile_loss(mesh)
    for seed, logit_scale in enumerate((math.log(1 / 0.07), 0.0, math.log(100))):
        images, texts = embeddings(16, 8, seed=seed)
        (loss, metrics), gradients = compiled(*on_devices(mesh, images, texts, logit_scale))
        expected_loss, expected_gradients, (image_to_text, text_to_image) = reference(images, texts, logit_scale)
        np.testing.assert_allclose(loss, expected_loss, rtol=2e-5)
        for gradient, expected in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=2e-5 * np.abs(expected).max())
        assert 0 < image_to_text < 1  # the case tells right from wrong
        assert metrics["image_to_text_accuracy"] == pytest.approx(image_to_text)
        assert metrics["text_to_image_accuracy"] == pytest.approx(text_to_image)


def test_accuracy_counts_a_right_pair_on_whichever_device_it_lies(mesh_of):
    mesh = mesh_of((4, 2))
    compiled = compile_loss(mesh)
    identity = np.eye(16)
    for right in range(16):
        # Each image resembles the text before its own, and its own less than any: all wrong but one.
        images = 0.9 * np.roll(identity, -1, axis=0) - 0.1 * identity
        images[right] = identity[right]
        (_, metrics), _ = compiled(*on_devices(mesh, images, identity, 1.0))
        assert metrics["image_to_text_accuracy"] == 1 / 16
        assert metrics["text_to_image_accuracy"] == 1 / 16


def test_accuracies_of_the_two_directions_are_not_exchanged(mesh_of):
    mesh = mesh_of((2, 4))
    images = np.eye(8)
    images[1:] = 0.9 * images[0] + 0.5 * images[1:]  # every image finds text 0 first; every text finds its image
    (_, metrics), _ = compile_loss(mesh)(*on_devices(mesh, images, np.eye(8), 1.0))
    assert metrics["image_to_text_accuracy"] == 1 / 8
    assert metrics["text_to_image_accuracy"] == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_the_highest_temperature_with_all_embeddings_alike_is_finite(mesh_of, sign):
    mesh = mesh_of((4, 2))
    same = np.tile(embeddings(1, 8)[0], (16, 1))
    (loss, _), gradients = compile_loss(mesh)(*on_devices(mesh, same, sign * same, math.log(100)))
    assert loss == pytest.approx(math.log(16), rel=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert abs(gradients[2]) < 1e-3


def test_the_highest_temperature_with_every_pair_wrong_is_finite(mesh_of):
    mesh = mesh_of((2, 4))
    images = np.eye(16)
    (loss, _), gradients = compile_loss(mesh)(*on_devices(mesh, images, np.roll(images, 1, axis=0), math.log(100)))
    assert loss == pytest.approx(100, rel=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_no_device_forms_more_than_its_rows_of_the_similarities(mesh_of, shape):
    mesh, count, width = mesh_of(shape), 128, 4
    arguments = on_devices(mesh, *embeddings(count, width), 1.0)
    program = compile_loss(mesh).lower(*arguments).compile().as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d*\[(\d+(?:,\d+)*)\]", program)}
    assert (count // 8, count) in shapes or (count, count // 8) in shapes
    assert max(math.prod(dims) for dims in shapes) == count * count // 8
