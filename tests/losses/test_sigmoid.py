"""SigLIP's loss: the plain formula against algorithm 1 in numpy with gradients by hand; extremes."""

import math

import numpy as np
import pytest
from loss_cases import COUNT, assert_gradients, compiled, embeddings, make, on_devices, reference

from clip_jax.losses.sigmoid import Sigmoid


def test_the_plain_formula_is_algorithm_1_of_the_paper():
    (images, texts), scale, bias = embeddings(COUNT, 8), math.exp(1.5), -2.0
    logits = scale * images @ texts.T + bias
    labels = 2 * np.eye(COUNT) - 1
    by_logit = -labels / (1 + np.exp(labels * logits)) / COUNT
    loss, gradients = reference("sigmoid", images, texts, {"logit_scale": 1.5, "logit_bias": bias})
    np.testing.assert_allclose(loss, np.log1p(np.exp(-labels * logits)).sum() / COUNT, rtol=1e-12)
    scalars = {"logit_scale": (by_logit * (logits - bias)).sum(), "logit_bias": by_logit.sum()}
    assert_gradients(gradients, (scale * by_logit @ texts, scale * by_logit.T @ images, scalars))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_highest_temperature_is_finite_and_ties_are_wrong(mesh_of, sign):
    mesh = mesh_of((4, 2))
    same = np.tile(embeddings(1, 8)[0], (COUNT, 1))
    inputs = same, sign * same, {"logit_scale": math.log(100), "logit_bias": 5.0}
    (loss, metrics), gradients = compiled(make("sigmoid", mesh))(*on_devices(mesh, *inputs))
    expected_loss, expected_gradients = reference("sigmoid", *inputs)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_gradients(gradients, expected_gradients)
    assert metrics["image_to_text_accuracy"] == metrics["text_to_image_accuracy"] == 0


def test_it_starts_as_in_the_paper_and_does_not_limit_its_temperature(mesh_of):
    assert dict(Sigmoid.parameters) == {"logit_scale": math.log(10), "logit_bias": -10.0}
    parameters = {"logit_scale": 7.0, "logit_bias": -3.0}
    assert make("sigmoid", mesh_of((1, 1))).after_update(parameters) == parameters
