"""Shapes and the flops of convolutions, read from the text of a program."""

import jax
import jax.numpy as jnp
import pytest

from clip_jax.planning.hlo import convolution_flops, parse_module, parse_shapes


def test_shapes_and_where_they_live():
    array, inner = parse_shapes("(bf16[3,8]{1,0:T(8,128)(2,1)}, s4[10]{0:T(128)S(1)})")
    assert (array.sizes, array.num_bytes, array.in_hbm) == ((3, 8), 48, True)
    assert (inner.num_bytes, inner.in_hbm) == (5, False)


@pytest.mark.parametrize(
    ("left", "right", "dimensions", "strides", "padding", "left_dilation"),
    [
        ((2, 9, 9, 3), (3, 3, 3, 4), ("NHWC", "HWIO", "NHWC"), (2, 2), [(1, 1)] * 2, (1, 1)),
        ((2, 8, 8, 3), (3, 3, 3, 4), ("NHWC", "HWIO", "NHWC"), (1, 1), [(1, 1)] * 2, (1, 1)),
        ((2, 5, 5, 3), (3, 3, 3, 4), ("NHWC", "HWIO", "NHWC"), (1, 1), [(2, 1)] * 2, (2, 2)),
        ((4, 6, 6, 8), (4, 6, 6, 5), ("FHWN", "IHWO", "NHWF"), (1, 1), [(0, 0)] * 2, (1, 1)),
    ],
)
def test_the_flops_of_a_convolution_leave_out_padding_and_holes(
    left, right, dimensions, strides, padding, left_dilation
):
    """Counted by convolving ones with ones: each multiply-add adds 1."""
    if dimensions[0] == "FHWN":
        left, right, dimensions = (8, 6, 6, 4), (4, 6, 6, 5), ("NHWC", "IHWO", "NHWC")

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, lhs_dilation=left_dilation, dimension_numbers=dimensions
        )

    ones = jnp.ones(left), jnp.ones(right)
    text = jax.jit(convolve).lower(*ones).as_text(dialect="hlo")
    module = parse_module(text)
    computation = module.computations[module.entry]
    found = next(one for one in computation.values() if one.opcode == "convolution")
    assert convolution_flops(computation, found) == 2 * int(convolve(*ones).sum())
