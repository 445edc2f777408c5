"""What holds for every loss, however it is computed: its plain formula, on every mesh, with right metrics."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from loss_cases import (
    CASES,
    COUNT,
    assert_gradients,
    compiled,
    embeddings,
    logits_of,
    make,
    on_devices,
    parameters_of,
    reference,
    reference_accuracies,
    reference_pair_losses,
)

from clip_jax.losses import LOSSES
from clip_jax.losses.base import Loss, accuracies
from clip_jax.losses.products import Products
from clip_jax.losses.softmax import FORMS
from clip_jax.models.clip import CLIP

MESHES = [
    (1, 1),
    (2, 1),
    (2, 4),
    (8, 1),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 2), (2, 2), (4, 2), (1, 8))),
]


def test_every_loss_and_form_is_among_the_cases():
    assert {changes["kind"] for changes in CASES.values()} == set(LOSSES)
    assert {changes["form"] for changes in CASES.values() if "form" in changes} == set(FORMS) - {"auto"}


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_metrics_are_those_of_the_plain_formula_on_every_mesh(mesh_of, shape, case):
    mesh = mesh_of(shape)
    run = compiled(make(case, mesh))
    for seed, logit_scale in enumerate((math.log(1 / 0.07), 0.0, math.log(100))):
        inputs = *embeddings(COUNT, 8, seed=seed), parameters_of(case, logit_scale)
        (loss, metrics), gradients = jax.block_until_ready(run(*on_devices(mesh, *inputs)))
        expected_loss, expected_gradients = reference(case, *inputs)
        logits = logits_of(*inputs)
        image_to_text, text_to_image = reference_accuracies(logits)
        np.testing.assert_allclose(loss, expected_loss, rtol=2e-5)
        assert_gradients(gradients, expected_gradients)
        assert 0 < image_to_text < 1  # some pairs are right and some are wrong
        assert metrics["image_to_text_accuracy"] == pytest.approx(image_to_text)
        assert metrics["text_to_image_accuracy"] == pytest.approx(text_to_image)
        np.testing.assert_allclose(metrics["pair_losses"], reference_pair_losses(case, logits), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(metrics["pair_losses"].mean(), loss, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_the_devices_in_the_mesh_makes_no_difference(case):
    devices = np.array(jax.devices())[[3, 0, 6, 1, 7, 2, 5, 4]].reshape(2, 4)
    mesh = Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    inputs = *embeddings(COUNT, 8), parameters_of(case, 2.0)
    (loss, metrics), gradients = jax.block_until_ready(compiled(make(case, mesh))(*on_devices(mesh, *inputs)))
    expected_loss, expected_gradients = reference(case, *inputs)
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-5)
    assert_gradients(gradients, expected_gradients)
    assert metrics["image_to_text_accuracy"] == pytest.approx(reference_accuracies(logits_of(*inputs))[0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("scale", "tolerance"), [(1 / 0.07, 2e-3), (100, 5e-3)])
def test_products_as_gpus_make_them_are_precise_enough(mesh_of, case, scale, tolerance):
    """Operands of 11 bits, TF32, for the similarities, and of 8, bfloat16, for the gradients; sums in float32."""

    def product_of(bits):
        def product(left, right):
            left, right = (jax.lax.reduce_precision(x, 8, bits - 1) for x in (left, right))
            return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)

        return product

    mesh = mesh_of((1, 1))
    rounded = dataclasses.replace(make(case, mesh, 100, 512), products=Products(*map(product_of, (11, 8))))
    inputs = *embeddings(512, 64, alike=0.2), parameters_of(case, math.log(scale))
    (loss, _), gradients = compiled(rounded)(*on_devices(mesh, *inputs))
    expected_loss, expected_gradients = reference(case, *inputs)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    for gradient, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert np.linalg.norm(gradient - expected) < tolerance * np.linalg.norm(expected)
    assert np.linalg.norm(gradients[0] - expected_gradients[0]) > 1e-6 * np.linalg.norm(expected_gradients[0])


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_right_behind_the_loss_and_before_it(mesh_of, case):
    """As part of a longer program: a scaled loss of embeddings that are made from others, on no particular device."""
    loss, (images, texts) = make(case, mesh_of((4, 2))), embeddings(COUNT, 8)
    parameters = parameters_of(case, 2.0)
    program = jax.jit(
        jax.grad(lambda images, texts, scalars: 3 * loss(images, texts * 2, scalars)[0], argnums=(0, 1, 2))
    )
    inputs = jnp.float32(images), jnp.float32(texts / 2), jax.tree.map(jnp.float32, parameters)
    gradients = jax.block_until_ready(program(*inputs))
    _, (of_images, of_texts, of_scalars) = reference(case, images, texts, parameters)
    assert_gradients(gradients, (3 * of_images, 6 * of_texts, jax.tree.map(lambda x: 3 * x, of_scalars)))


@pytest.mark.parametrize("case", CASES)
def test_the_loss_without_gradients_is_the_same(mesh_of, case):
    mesh = mesh_of((2, 4))
    inputs = *embeddings(COUNT, 8), parameters_of(case, 2.0)
    loss, metrics = jax.block_until_ready(jax.jit(make(case, mesh))(*on_devices(mesh, *inputs)))
    np.testing.assert_allclose(loss, reference(case, *inputs)[0], rtol=2e-5)
    assert metrics["image_to_text_accuracy"] == pytest.approx(reference_accuracies(logits_of(*inputs))[0])


@pytest.mark.parametrize("case", CASES)
def test_accuracy_counts_a_right_pair_on_every_device(mesh_of, case):
    mesh = mesh_of((4, 2))
    run = compiled(make(case, mesh, count=16))
    identity = np.eye(16)
    for right in range(16):
        # Each image is like the text before its own, and its own is less like it than any other: only one is right.
        images = 0.9 * np.roll(identity, -1, axis=0) - 0.1 * identity
        images[right] = identity[right]
        (_, metrics), _ = jax.block_until_ready(run(*on_devices(mesh, images, identity, parameters_of(case, 1.0))))
        assert metrics["image_to_text_accuracy"] == 1 / 16
        assert metrics["text_to_image_accuracy"] == 1 / 16


@pytest.mark.parametrize("case", CASES)
def test_accuracies_of_the_two_directions_are_not_exchanged(mesh_of, case):
    mesh = mesh_of((2, 4))
    images = np.eye(8)
    images[1:] = 0.9 * images[0] + 0.5 * images[1:]  # every image finds text 0 first; every text finds its image
    inputs = on_devices(mesh, images, np.eye(8), parameters_of(case, 1.0))
    (_, metrics), _ = compiled(make(case, mesh, count=8))(*inputs)
    assert metrics["image_to_text_accuracy"] == 1 / 8
    assert metrics["text_to_image_accuracy"] == 1
    plain = accuracies(jnp.float32(images @ np.eye(8)))
    assert plain == {"image_to_text_accuracy": 1 / 8, "text_to_image_accuracy": 1}
    assert accuracies(jnp.ones((8, 8))) == {"image_to_text_accuracy": 0, "text_to_image_accuracy": 0}


def test_a_published_model_has_the_parameters_of_the_paper_s_loss():
    assert CLIP.loss_parameters == LOSSES["softmax"].parameters


def test_a_loss_without_a_temperature_for_predictions_is_refused():
    with pytest.raises(TypeError, match="lacks logit_scale, which predictions are made with"):
        type("Bare", (Loss,), {"parameters": (("margin", 0.2),)})
