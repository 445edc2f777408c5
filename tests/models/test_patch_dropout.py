"""Which patches of an image patch dropout keeps."""

import numpy as np

from clip_jax.models.patch_dropout import choose_patches, num_kept_patches


def test_a_fixed_share_of_the_patches_is_kept_but_at_least_one():
    assert [num_kept_patches(256, share) for share in (0.0, 0.5, 0.75)] == [256, 128, 64]
    assert [num_kept_patches(49, 0.5), num_kept_patches(100, 0.9), num_kept_patches(50, 0.8)] == [24, 10, 10]
    assert num_kept_patches(4, 0.99) == 1


def test_each_image_keeps_patches_of_its_own_in_order_and_each_at_most_once():
    seeds = np.random.default_rng(0).integers(2**32, size=64, dtype=np.uint32)
    kept = np.asarray(choose_patches(seeds, 16, 0.5))
    assert kept.shape == (64, 8)
    assert (np.diff(kept, axis=1) > 0).all()
    assert kept.min() == 0 and kept.max() == 15
    assert len(np.unique(kept, axis=0)) > 50
    np.testing.assert_array_equal(kept[::-1], choose_patches(seeds[::-1].copy(), 16, 0.5))
    # Every patch has the same chance: 32 of 64, give or take four standard deviations.
    assert (np.abs(np.bincount(kept.ravel(), minlength=16) - 32) < 16).all()
