"""The blockwise softmax loss: any size of blocks, and no more memory than one of them, gradients included."""

import math

import jax
import numpy as np
import pytest
from loss_cases import (
    COUNT,
    array_shapes,
    assert_gradients,
    compiled,
    embeddings,
    make,
    on_devices,
    parameters_of,
    reference,
)

BLOCKWISE = ("blockwise", "sigmoid")


@pytest.mark.parametrize("block_size", [1, 5, 1000])
@pytest.mark.parametrize("case", BLOCKWISE)
def test_no_size_of_the_blocks_changes_the_result(mesh_of, case, block_size):
    mesh = mesh_of((2, 2))
    inputs = *embeddings(COUNT, 8), parameters_of(case, math.log(100))
    (loss, _), gradients = compiled(make(case, mesh, block_size))(*on_devices(mesh, *inputs))
    expected_loss, expected_gradients = reference(case, *inputs)
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-5)
    assert_gradients(gradients, expected_gradients)


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize("case", BLOCKWISE)
def test_no_device_holds_more_than_a_block_of_similarities_and_its_own_part_of_the_batch(mesh_of, case):
    """In the program of the loss and its gradients: differentiating a blockwise loss can keep every block."""
    mesh, count, width, block = mesh_of((2, 4)), 512, 4, 8
    arguments = on_devices(mesh, *embeddings(count, width), parameters_of(case, 1.0))
    shapes = array_shapes(compiled(make(case, mesh, block, count)).lower(*arguments).compile().as_text())
    assert (block, block) in shapes
    # The largest array is a device's images; the device's rows of the similarities are 16 times that.
    assert max(math.prod(dims) for dims in shapes) == count // 8 * width


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize(("case", "of_loss", "with_gradients"), [("blockwise", 1, 4), ("sigmoid", 1, 3)])
def test_only_the_matrix_products_that_are_asked_for_are_made(mesh_of, case, of_loss, with_gradients):
    mesh = mesh_of((2, 1))
    arguments = on_devices(mesh, *embeddings(64, 4), parameters_of(case, 1.0))
    loss = make(case, mesh, 8, 64)
    programs = jax.jit(loss), compiled(loss)
    products = [program.lower(*arguments).compile().as_text().count(" dot(") for program in programs]
    assert products == [of_loss, with_gradients]
