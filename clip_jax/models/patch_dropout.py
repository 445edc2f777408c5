"""Patch dropout (FLIP, arXiv 2212.00794, section 3): which patches of an image a training step keeps."""

import jax
import jax.numpy as jnp


def num_kept_patches(num_patches: int, patch_dropout: float) -> int:
    """How many patches of an image are kept: the share ``1 - patch_dropout``, rounded down, but at least one."""
    return max(1, int(num_patches * (1 - patch_dropout) + 1e-6))  # 1 - 0.9 is a little less than 0.1


def choose_patches(seeds: jax.Array, num_patches: int, patch_dropout: float) -> jax.Array:
    """Draws which patches of each image are kept: int32 ``[B, K]``, in rising order, from its seed of uint32 ``[B]``.

    K is :func:`num_kept_patches`.
    """
    numbers = jax.vmap(lambda seed: jax.random.uniform(jax.random.key(seed), (num_patches,)))(seeds)
    order = jnp.argsort(numbers, axis=1)
    return jnp.sort(order[:, : num_kept_patches(num_patches, patch_dropout)], axis=1)
