"""Resizes a learned positional embedding to another image size."""

import math

import jax
import jax.numpy as jnp


def resize_positions(positions: jax.Array, side: int) -> jax.Array:
    """Resizes ``[1 + n * n, W]`` to ``[1 + side * side, W]``, in the same dtype. The first row is unchanged.

    Bicubic with antialiasing and without aligned corners.

    Source: ``resize_pos_embed`` in open_clip's ``model.py``.
    """
    first, grid = positions[:1], positions[1:]
    before, width = math.isqrt(len(grid)), positions.shape[1]
    if before == side:
        return positions
    grid = grid.astype(jnp.float32).reshape(before, before, width)
    resized = jax.image.resize(grid, (side, side, width), "cubic", antialias=True).reshape(-1, width)
    return jnp.concatenate([first, resized.astype(positions.dtype)])
