"""Learned positions of an image's places, for another number of places than they were learned for."""

import math

import jax
import jax.numpy as jnp


def resize_positions(positions: jax.Array, side: int) -> jax.Array:
    """Positions ``[1 + n * n, W]`` to ``[1 + side * side, W]``, in their dtype; the first, which has no place, is kept.

    Bicubic with antialiasing and without aligned corners, as open_clip's ``resize_pos_embed`` does (its ``model.py``).
    """
    first, grid = positions[:1], positions[1:]
    before, width = math.isqrt(len(grid)), positions.shape[1]
    if before == side:
        return positions
    grid = grid.astype(jnp.float32).reshape(before, before, width)
    resized = jax.image.resize(grid, (side, side, width), "cubic", antialias=True).reshape(-1, width)
    return jnp.concatenate([first, resized.astype(positions.dtype)])
