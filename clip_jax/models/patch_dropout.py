"""Patch dropout: draws which patches of an image a training step keeps (FLIP, arXiv 2212.00794, section 3)."""

import jax
import jax.numpy as jnp


def num_kept_patches(num_patches: int, patch_dropout: float) -> int:
    """Returns how many patches of an image are kept: the share ``1 - patch_dropout``, rounded down, at least one."""
    return max(1, int(num_patches * (1 - patch_dropout) + 1e-6))  # 1 - 0.9 is a little less than 0.1


def choose_patches(seeds: jax.Array, num_patches: int, patch_dropout: float) -> jax.Array:
    """Returns the patches to keep of each image: int32 ``[B, K]``, sorted; K is :func:`num_kept_patches`.

    Image i is drawn from ``seeds[i]``, uint32 ``[B]``.
    """
    numbers = jax.vmap(lambda seed: jax.random.uniform(jax.random.key(seed), (num_patches,)))(seeds)
    order = jnp.argsort(numbers, axis=1)
    return jnp.sort(order[:, : num_kept_patches(num_patches, patch_dropout)], axis=1)
