"""The sharded losses against figure 3 of the paper and SigLIP's algorithm 1, in float64 numpy, gradients by hand."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.training import loss as loss_module
from clip_jax.training.loss import LOSS_FORMS, choose_form, contrastive_loss, sigmoid_loss
from clip_jax.training.sharding import batch_sharding

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (8, 1), (4, 2), (2, 4), (1, 8)]
COUNT, BLOCK_SIZE = 40, 3  # 40, 20, 10 or 5 pairs a device, none a multiple of the block
LOSSES = (*LOSS_FORMS, "sigmoid")


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


def sigmoid_reference(images, texts, logit_scale, logit_bias):
    """The same for the sigmoid loss, with the gradient by logit_bias after the others."""
    count = len(images)
    logits = math.exp(logit_scale) * images @ texts.T + logit_bias
    labels = 2 * np.eye(count) - 1
    loss = np.logaddexp(0, -labels * logits).sum() / count
    of_logits = -labels / (1 + np.exp(labels * logits)) / count
    scaled = math.exp(logit_scale) * of_logits
    gradients = scaled @ texts, scaled.T @ images, (of_logits * (logits - logit_bias)).sum(), of_logits.sum()
    accuracies = [(logits.argmax(axis) == np.arange(count)).mean() for axis in (1, 0)]
    return loss, gradients, accuracies


def pair_losses_reference(kind, images, texts, logit_scale, logit_bias=0.0):
    """What each pair adds to the loss, times the number of pairs."""
    logits = math.exp(logit_scale) * images @ texts.T + logit_bias
    if kind == "sigmoid":
        return np.logaddexp(0, -(2 * np.eye(len(images)) - 1) * logits).sum(axis=1)
    return -(np.diag(log_softmax(logits, 1)) + np.diag(log_softmax(logits, 0))) / 2


def embeddings(count, width, alike=0.7, seed=0):
    """Unit vectors; each text resembles its image."""
    random = np.random.default_rng(seed)
    images = random.normal(size=(count, width))
    texts = alike * images + random.normal(size=(count, width))
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts)]


def loss_on(mesh, kind, block_size=BLOCK_SIZE):
    """A function of images, texts, logit_scale and, of the sigmoid loss, logit_bias."""
    if kind == "sigmoid":
        return lambda *a: sigmoid_loss(*a, mesh, block_size)
    return lambda *a: contrastive_loss(*a, mesh, kind, block_size)


def compile_loss(mesh, kind, block_size=BLOCK_SIZE):
    arguments = (0, 1, 2, 3) if kind == "sigmoid" else (0, 1, 2)
    return jax.jit(jax.value_and_grad(loss_on(mesh, kind, block_size), argnums=arguments, has_aux=True))


def on_devices(mesh, images, texts, *scalars):
    rows = [jax.device_put(jnp.float32(x), batch_sharding(mesh)) for x in (images, texts)]
    return *rows, *map(jnp.float32, scalars)


def scalars_of(kind, logit_scale):
    return (logit_scale, -2.0) if kind == "sigmoid" else (logit_scale,)


def reference_of(kind):
    return sigmoid_reference if kind == "sigmoid" else reference


def assert_gradients(gradients, expected):
    for gradient, of_reference in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, of_reference, rtol=1e-3, atol=2e-5 * np.abs(of_reference).max())


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_gradients_and_accuracies_are_those_of_the_paper_on_every_mesh(mesh_of, shape, kind):
    mesh = mesh_of(shape)
    compiled = compile_loss(mesh, kind)
    for seed, logit_scale in enumerate((math.log(1 / 0.07), 0.0, math.log(100))):
        inputs = *embeddings(COUNT, 8, seed=seed), *scalars_of(kind, logit_scale)
        (loss, metrics), gradients = jax.block_until_ready(compiled(*on_devices(mesh, *inputs)))
        expected_loss, expected_gradients, (image_to_text, text_to_image) = reference_of(kind)(*inputs)
        np.testing.assert_allclose(loss, expected_loss, rtol=2e-5)
        assert_gradients(gradients, expected_gradients)
        assert 0 < image_to_text < 1  # the case tells right from wrong
        assert metrics["image_to_text_accuracy"] == pytest.approx(image_to_text)
        assert metrics["text_to_image_accuracy"] == pytest.approx(text_to_image)
        np.testing.assert_allclose(metrics["pair_losses"], pair_losses_reference(kind, *inputs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(("scale", "tolerance"), [(1 / 0.07, 2e-3), (100, 5e-3)])
def test_products_as_gpus_make_them_are_precise_enough(mesh_of, monkeypatch, kind, scale, tolerance):
    """Operands of 11 bits, TF32, for the similarities, and of 8, bfloat16, for the gradients; sums in float32."""

    def product_of(bits):
        def product(left, right):
            left, right = (jax.lax.reduce_precision(x, 8, bits - 1) for x in (left, right))
            return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)

        return product

    monkeypatch.setattr(
        loss_module, "_products_on", lambda mesh, dtype: loss_module.Products(*map(product_of, (11, 8)))
    )
    mesh = mesh_of((1, 1))
    inputs = *embeddings(512, 64, alike=0.2), *scalars_of(kind, math.log(scale))
    (loss, _), gradients = compile_loss(mesh, kind, 100)(*on_devices(mesh, *inputs))
    expected_loss, expected_gradients, _ = reference_of(kind)(*inputs)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        error = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
        assert error < tolerance
    assert np.linalg.norm(gradients[0] - expected_gradients[0]) > 1e-6 * np.linalg.norm(expected_gradients[0])


@pytest.mark.parametrize("block_size", [1, 5, 1000])
@pytest.mark.parametrize("kind", ["blockwise", "sigmoid"])
def test_no_size_of_the_blocks_changes_the_result(mesh_of, kind, block_size):
    mesh = mesh_of((2, 2))
    inputs = *embeddings(COUNT, 8), *scalars_of(kind, math.log(100))
    (loss, _), gradients = compile_loss(mesh, kind, block_size)(*on_devices(mesh, *inputs))
    expected_loss, expected_gradients, _ = reference_of(kind)(*inputs)
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-5)
    assert_gradients(gradients, expected_gradients)


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_are_right_behind_the_loss_and_before_it(mesh_of, kind):
    """As part of a longer program: a scaled loss of embeddings that are made from others, on no particular device."""
    loss_of, (images, texts) = loss_on(mesh_of((4, 2)), kind), embeddings(COUNT, 8)
    scalars = scalars_of(kind, 2.0)
    program = jax.jit(
        jax.grad(lambda images, texts, *rest: 3 * loss_of(images, texts * 2, *rest)[0], argnums=(0, 1, 2))
    )
    gradients = jax.block_until_ready(program(jnp.float32(images), jnp.float32(texts / 2), *scalars))
    _, (of_images, of_texts, of_scale, *_), _ = reference_of(kind)(images, texts, *scalars)
    assert_gradients(gradients, (3 * of_images, 6 * of_texts, 3 * of_scale))


@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_without_gradients_is_the_same(mesh_of, kind):
    mesh = mesh_of((2, 4))
    inputs = *embeddings(COUNT, 8), *scalars_of(kind, 2.0)
    loss, metrics = jax.block_until_ready(jax.jit(loss_on(mesh, kind))(*on_devices(mesh, *inputs)))
    expected, _, (image_to_text, _) = reference_of(kind)(*inputs)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    assert metrics["image_to_text_accuracy"] == pytest.approx(image_to_text)


@pytest.mark.parametrize("kind", LOSSES)
def test_accuracy_counts_a_right_pair_on_whichever_device_it_lies(mesh_of, kind):
    mesh = mesh_of((4, 2))
    compiled = compile_loss(mesh, kind)
    identity = np.eye(16)
    for right in range(16):
        # Each image resembles the text before its own, and its own less than any: all wrong but one.
        images = 0.9 * np.roll(identity, -1, axis=0) - 0.1 * identity
        images[right] = identity[right]
        (_, metrics), _ = jax.block_until_ready(compiled(*on_devices(mesh, images, identity, *scalars_of(kind, 1.0))))
        assert metrics["image_to_text_accuracy"] == 1 / 16
        assert metrics["text_to_image_accuracy"] == 1 / 16


@pytest.mark.parametrize("kind", LOSSES)
def test_accuracies_of_the_two_directions_are_not_exchanged(mesh_of, kind):
    mesh = mesh_of((2, 4))
    images = np.eye(8)
    images[1:] = 0.9 * images[0] + 0.5 * images[1:]  # every image finds text 0 first; every text finds its image
    inputs = on_devices(mesh, images, np.eye(8), *scalars_of(kind, 1.0))
    (_, metrics), _ = compile_loss(mesh, kind)(*inputs)
    assert metrics["image_to_text_accuracy"] == 1 / 8
    assert metrics["text_to_image_accuracy"] == 1


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", LOSS_FORMS)
def test_the_highest_temperature_with_all_embeddings_alike_is_finite_and_all_wrong(mesh_of, sign, form):
    mesh = mesh_of((4, 2))
    same = np.tile(embeddings(1, 8)[0], (COUNT, 1))
    (loss, metrics), gradients = compile_loss(mesh, form)(*on_devices(mesh, same, sign * same, math.log(100)))
    assert loss == pytest.approx(math.log(COUNT), rel=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert abs(gradients[2]) < 1e-3
    assert metrics["image_to_text_accuracy"] == metrics["text_to_image_accuracy"] == 0


@pytest.mark.parametrize("form", LOSS_FORMS)
def test_the_highest_temperature_with_every_pair_wrong_is_finite(mesh_of, form):
    mesh = mesh_of((2, 4))
    images = np.eye(16)
    inputs = on_devices(mesh, images, np.roll(images, 1, axis=0), math.log(100))
    (loss, _), gradients = compile_loss(mesh, form)(*inputs)
    assert loss == pytest.approx(100, rel=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sigmoid_loss_at_the_highest_temperature_is_finite_and_its_ties_are_wrong(mesh_of, sign):
    mesh = mesh_of((4, 2))
    same = np.tile(embeddings(1, 8)[0], (COUNT, 1))
    inputs = same, sign * same, math.log(100), 5.0
    (loss, metrics), gradients = compile_loss(mesh, "sigmoid")(*on_devices(mesh, *inputs))
    expected_loss, expected_gradients, _ = sigmoid_reference(*inputs)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_gradients(gradients, expected_gradients)
    assert metrics["image_to_text_accuracy"] == metrics["text_to_image_accuracy"] == 0


@pytest.mark.parametrize("form", LOSS_FORMS)
def test_a_single_pair_is_right_and_costs_nothing(mesh_of, form):
    mesh = mesh_of((1, 1))
    (loss, metrics), gradients = compile_loss(mesh, form)(*on_devices(mesh, *embeddings(1, 8), math.log(100)))
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)
    assert metrics["image_to_text_accuracy"] == metrics["text_to_image_accuracy"] == 1


@pytest.fixture
def full_compilation():
    """For tests that read the program: the simplifications that come without optimisation leave copies behind."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def array_shapes(program):
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d*\[(\d+(?:,\d+)*)\]", program)}


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_no_device_forms_more_than_its_rows_of_the_similarities(mesh_of, shape):
    mesh, count, width = mesh_of(shape), 128, 4
    arguments = on_devices(mesh, *embeddings(count, width), 1.0)
    shapes = array_shapes(compile_loss(mesh, "gather").lower(*arguments).compile().as_text())
    assert (count // 8, count) in shapes or (count, count // 8) in shapes
    assert max(math.prod(dims) for dims in shapes) == count * count // 8


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize("kind", ["blockwise", "sigmoid"])
def test_no_device_holds_more_than_a_block_of_similarities_and_its_own_part_of_the_batch(mesh_of, kind):
    mesh, count, width, block = mesh_of((2, 4)), 512, 4, 8
    arguments = on_devices(mesh, *embeddings(count, width), *scalars_of(kind, 1.0))
    shapes = array_shapes(compile_loss(mesh, kind, block).lower(*arguments).compile().as_text())
    assert (block, block) in shapes
    assert (
        max(math.prod(dims) for dims in shapes) == count // 8 * width
    )  # a device's images; its rows are 16 times that


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize(("kind", "of_loss", "with_gradients"), [("blockwise", 1, 4), ("sigmoid", 1, 3)])
def test_only_the_matrix_products_that_are_asked_for_are_made(mesh_of, kind, of_loss, with_gradients):
    mesh = mesh_of((2, 1))
    arguments = on_devices(mesh, *embeddings(64, 4), *scalars_of(kind, 1.0))
    programs = jax.jit(loss_on(mesh, kind, 8)), compile_loss(mesh, kind, 8)
    products = [program.lower(*arguments).compile().as_text().count(" dot(") for program in programs]
    assert products == [of_loss, with_gradients]


def test_the_form_is_chosen_by_the_size_of_a_device_s_logits():
    assert choose_form(32_768, 256) == choose_form(65_536, 256) == choose_form(4_096, 1) == "gather"
    assert choose_form(131_072, 256) == choose_form(32_768, 16) == choose_form(16_384, 1) == "blockwise"


def test_an_unknown_form_is_named_with_the_known_ones(mesh_of):
    with pytest.raises(ValueError, match="'ring'; known are gather, blockwise"):
        contrastive_loss(*embeddings(4, 8), 0.0, mesh_of((1, 1)), form="ring")
