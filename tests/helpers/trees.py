"""What the tests of steps and optimizers ask of trees: Adam's state among them, and whether two are close."""

import jax
import numpy as np
import optax


def adam_state(opt_state) -> optax.ScaleByAdamState:
    """Adam's means of the gradients and of their squares, among all of an optimizer's state."""

    def is_adam(leaf) -> bool:
        return isinstance(leaf, optax.ScaleByAdamState)

    [adam] = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(leaf)]
    return adam


def assert_trees_close(result, expected, rtol):
    """To ``rtol`` of each tensor's greatest entry."""

    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(np.abs(b).max(), 1e-4))

    jax.tree.map(check, result, expected)


def assert_all_close(result, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), result, expected)
