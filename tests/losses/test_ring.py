"""The ring by itself, with comparisons whose results are known: every image meets every text exactly once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.losses.ring import MOST_NEGATIVE, merge_sums, pair_masks, ring
from clip_jax.losses.shards import ROWS


def around(mesh, compare, images, texts, block_size):
    run = functools.partial(ring, compare, merge_sums, block_size=block_size)
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(ROWS, ROWS), out_specs=(ROWS, ROWS)))(images, texts)


@pytest.mark.parametrize("block_size", [1, 2, 3, 100])
@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (4, 2)])
def test_every_image_meets_every_text_once_and_results_come_home(mesh_of, shape, block_size):
    count = 40
    images, texts = (np.random.default_rng(seed).normal(size=(count, 2)).astype(np.float32) for seed in (0, 1))

    def compare(image, text):
        positive, negative = pair_masks(image, text)
        products = image["embedding"] @ text["embedding"].T
        masked = jnp.where(negative, products, MOST_NEGATIVE)
        positives, seen = jnp.where(positive, products, 0), (positive | negative).astype(jnp.float32)
        return (
            {"largest": masked.max(axis=1), "own": positives.sum(axis=1), "seen": seen.sum(axis=1)},
            {"largest": masked.max(axis=0), "own": positives.sum(axis=0), "seen": seen.sum(axis=0)},
        )

    by_image, by_text = around(mesh_of(shape), compare, {"embedding": images}, {"embedding": texts}, block_size)
    products = images @ texts.T
    others = np.where(np.eye(count, dtype=bool), -np.inf, products)
    for result, axis in ((by_image, 1), (by_text, 0)):
        assert (result["seen"] == count).all()
        np.testing.assert_allclose(result["own"], np.diag(products), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result["largest"], others.max(axis=axis), rtol=1e-5, atol=1e-6)


def test_masks_leave_padding_out():
    image, text = {"pair": jnp.array([4, 5, -1])}, {"pair": jnp.array([5, -1])}
    positive, negative = pair_masks(image, text)
    assert positive.tolist() == [[False, False], [True, False], [False, False]]
    assert negative.tolist() == [[True, False], [False, False], [False, False]]
