"""The paper's loss: the plain formula against figure 3 in numpy with gradients by hand; forms, extremes, memory."""

import math

import numpy as np
import pytest
from loss_cases import (
    COUNT,
    array_shapes,
    assert_gradients,
    compiled,
    embeddings,
    logits_of,
    make,
    on_devices,
    reference,
)

from clip_jax.losses.softmax import Softmax, choose_form

FORMS = ("gather", "blockwise")


def softmax(logits, axis):
    exponentials = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return exponentials / exponentials.sum(axis=axis, keepdims=True)


def test_the_plain_formula_is_figure_3_of_the_paper():
    (images, texts), parameters = embeddings(COUNT, 8), {"logit_scale": 2.0}
    logits = logits_of(images, texts, parameters)
    by_row, by_column = softmax(logits, 1), softmax(logits, 0)
    by_logit = (by_row + by_column) / (2 * COUNT) - np.eye(COUNT) / COUNT
    scaled = math.exp(2.0) * by_logit
    loss, gradients = reference("gather", images, texts, parameters)
    np.testing.assert_allclose(loss, -np.trace(np.log(by_row) + np.log(by_column)) / (2 * COUNT), rtol=1e-12)
    assert_gradients(gradients, (scaled @ texts, scaled.T @ images, {"logit_scale": (by_logit * logits).sum()}))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", FORMS)
def test_the_highest_temperature_with_all_embeddings_alike_is_finite_and_all_wrong(mesh_of, sign, form):
    mesh = mesh_of((4, 2))
    same = np.tile(embeddings(1, 8)[0], (COUNT, 1))
    inputs = on_devices(mesh, same, sign * same, {"logit_scale": math.log(100)})
    (loss, metrics), (by_image, by_text, scalars) = compiled(make(form, mesh))(*inputs)
    assert loss == pytest.approx(math.log(COUNT), rel=1e-5)
    assert np.isfinite(by_image).all() and np.isfinite(by_text).all()
    assert abs(scalars["logit_scale"]) < 1e-3
    assert metrics["image_to_text_accuracy"] == metrics["text_to_image_accuracy"] == 0


@pytest.mark.parametrize("form", FORMS)
def test_the_highest_temperature_with_every_pair_wrong_is_finite(mesh_of, form):
    mesh = mesh_of((2, 4))
    images = np.eye(16)
    inputs = on_devices(mesh, images, np.roll(images, 1, axis=0), {"logit_scale": math.log(100)})
    (loss, _), (by_image, by_text, scalars) = compiled(make(form, mesh, count=16))(*inputs)
    assert loss == pytest.approx(100, rel=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in (by_image, by_text, scalars["logit_scale"]))


@pytest.mark.parametrize("form", FORMS)
def test_a_single_pair_is_right_and_costs_nothing(mesh_of, form):
    mesh = mesh_of((1, 1))
    inputs = on_devices(mesh, *embeddings(1, 8), {"logit_scale": math.log(100)})
    (loss, metrics), (by_image, by_text, scalars) = compiled(make(form, mesh, count=1))(*inputs)
    assert loss == scalars["logit_scale"] == 0
    assert (by_image == 0).all() and (by_text == 0).all()
    assert metrics["image_to_text_accuracy"] == metrics["text_to_image_accuracy"] == 1


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_no_device_forms_more_than_its_rows_of_the_similarities(mesh_of, shape):
    mesh, count, width = mesh_of(shape), 128, 4
    arguments = on_devices(mesh, *embeddings(count, width), {"logit_scale": 1.0})
    shapes = array_shapes(compiled(make("gather", mesh, count=count)).lower(*arguments).compile().as_text())
    assert (count // 8, count) in shapes or (count, count // 8) in shapes
    assert max(math.prod(dims) for dims in shapes) == count * count // 8


def test_the_form_is_chosen_by_the_size_of_a_device_s_logits():
    assert choose_form(32_768, 256) == choose_form(65_536, 256) == choose_form(4_096, 1) == "gather"
    assert choose_form(131_072, 256) == choose_form(32_768, 16) == choose_form(16_384, 1) == "blockwise"


def test_it_starts_as_in_the_paper_and_limits_its_temperature_to_between_1_and_100(mesh_of):
    assert dict(Softmax.parameters) == {"logit_scale": math.log(1 / 0.07)}
    loss = make("gather", mesh_of((1, 1)))
    for before, after in ((7.0, math.log(100)), (3.0, 3.0), (-1.0, 0.0)):
        assert loss.after_update({"logit_scale": before})["logit_scale"] == pytest.approx(after)


def test_only_the_gathered_form_has_an_option_that_saves_memory(mesh_of):
    assert make("gather", mesh_of((1, 1))).memory_option == "--config.loss.form=blockwise"
    assert make("blockwise", mesh_of((1, 1))).memory_option == make("sigmoid", mesh_of((1, 1))).memory_option == ""
