"""Attention and its projections with their written gradients, against the plain formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_all_close

from clip_jax.models.attention import attention, into_heads, out_of_heads
from clip_jax.models.execution import Execution

MERGED = pytest.mark.parametrize("merge_leading_axes", [True, False])
SUMS = pytest.mark.parametrize("sums_by_product", [False, True])


@MERGED
@pytest.mark.parametrize("which", [(0, 1, 2), (0,), (1, 2)])
def test_queries_keys_and_values_and_their_gradients_are_those_of_plain_products(which, merge_leading_axes):
    execution = Execution(merge_leading_axes=merge_leading_axes)
    random = np.random.default_rng(0)
    x, kernel, bias = (jnp.float32(random.normal(size=shape)) for shape in ((2, 5, 12), (12, 36), (36,)))

    def plain(x, kernel, bias):
        thirds = jnp.split(x @ kernel + bias, 3, axis=2)
        return tuple(thirds[i].reshape(2, 5, 3, 4).transpose(0, 2, 3, 1) for i in which)

    result, backward = jax.vjp(lambda *a: into_heads(*a, 3, which, execution), x, kernel, bias)
    expected, plain_backward = jax.vjp(plain, x, kernel, bias)
    cotangent = tuple(jnp.float32(random.normal(size=part.shape)) for part in expected)
    assert_all_close((result, backward(cotangent)), (expected, plain_backward(cotangent)))


@MERGED
def test_the_way_out_of_heads_and_its_gradients_are_those_of_einsum(merge_leading_axes):
    execution = Execution(merge_leading_axes=merge_leading_axes)
    random = np.random.default_rng(0)
    arguments = [jnp.float32(random.normal(size=shape)) for shape in ((2, 3, 4, 5), (3, 4, 6))]
    result, backward = jax.vjp(lambda *a: out_of_heads(*a, execution), *arguments)
    expected, plain_backward = jax.vjp(lambda x, kernel: jnp.einsum("bhdl,hdw->blw", x, kernel), *arguments)
    cotangent = jnp.float32(random.normal(size=result.shape))
    assert_all_close((result, backward(cotangent)), (expected, plain_backward(cotangent)))


HEADS = (2, 3, 4)  # batch, heads, and the width of each


def random_heads(length, seed=0, spread=1.0):
    """Queries, keys and values, ``[B, heads, D, L]`` each."""
    random = np.random.default_rng(seed)
    return tuple(random.normal(size=(*HEADS, length)) * spread for _ in range(3))


def attention_by_loops(query, key, value, visible):
    batch, num_heads, width, length = query.shape
    result = np.zeros(query.shape)
    for b in range(batch):
        for head in range(num_heads):
            for position in range(length):
                seen = visible[b, :, position]
                weights = np.exp(key[b, head].T[seen] @ query[b, head, :, position] / np.sqrt(width))
                result[b, head, :, position] = value[b, head][:, seen] @ weights / weights.sum()
    return result


def in_parts(array, lengths):
    return tuple(jnp.float32(part) for part in np.split(array, np.cumsum(lengths)[:-1], axis=3))


CAUSAL = np.triu(np.ones((7, 7), bool))  # keys before queries


UNTIL = np.arange(7)[:, None] <= np.array([2, 6])[:, None, None]  # [B, keys, 1]: two texts that end at 2 and at 6


@SUMS
@pytest.mark.parametrize("lengths", [(7,), (1, 6), (1, 2, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_of_any_parts_is_that_of_the_formula_head_by_head(lengths, dtype, sums_by_product):
    heads = random_heads(7)
    queries, keys, values = (jax.tree.map(dtype, in_parts(array, lengths)) for array in heads)
    parts = attention(queries, keys, values, None, sums_by_product)
    assert [part.shape[3] for part in parts] == list(lengths)
    assert {part.dtype for part in parts} == {jnp.dtype(dtype)}
    expected = attention_by_loops(*heads, np.ones((2, 7, 7), bool))
    tolerance = 1e-5 if dtype == jnp.float32 else 0.03
    np.testing.assert_allclose(jnp.float32(jnp.concatenate(parts, axis=3)), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("visible", [CAUSAL, UNTIL], ids=["causal", "until"])
def test_attention_sees_only_what_is_visible(visible):
    heads = random_heads(7)
    masked = visible if visible.ndim == 2 else visible[:, None]
    (result,) = attention(*((jnp.float32(array),) for array in heads), jnp.asarray(masked))
    everywhere = np.broadcast_to(visible, (2, 7, 7))
    np.testing.assert_allclose(result, attention_by_loops(*heads, everywhere), rtol=1e-5, atol=1e-5)


def plain_attention(queries, keys, values, visible):
    """By automatic differentiation, in one sequence."""
    query, key, value = (jnp.concatenate(parts, axis=3) for parts in (queries, keys, values))
    scores = jnp.einsum("bhdk,bhdq->bhkq", key, query) / np.sqrt(query.shape[2])
    scores = scores if visible is None else jnp.where(visible, scores, -jnp.inf)
    return jnp.einsum("bhkq,bhdk->bhdq", jax.nn.softmax(scores, axis=2), value)


@pytest.mark.parametrize(
    ("queries", "keys", "visible"),
    [((1, 6), (1, 6), None), ((7,), (7,), CAUSAL), ((1,), (1, 6), None), ((1,), (7,), UNTIL[:, None])],
    ids=["class token apart", "causal", "one query of two parts", "one query until its end"],
)
@SUMS
def test_the_written_gradients_of_attention_are_those_of_the_plain_formula_in_float64(
    queries, keys, visible, sums_by_product
):
    query, _, _ = random_heads(sum(queries), seed=1)
    _, key, value = random_heads(sum(keys), seed=2)
    cotangent = np.random.default_rng(3).normal(size=query.shape)
    visible = None if visible is None else jnp.asarray(visible)
    arguments = in_parts(query, queries), in_parts(key, keys), in_parts(value, keys)
    _, backward = jax.vjp(lambda *parts: attention(*parts, visible, sums_by_product), *arguments)
    gradients = backward(in_parts(cotangent, queries))
    with jax.enable_x64(True):
        wide = jax.tree.map(jnp.float64, arguments)
        _, backward = jax.vjp(lambda *parts: plain_attention(*parts, visible), *wide)
        expected = backward(jnp.float64(jnp.float32(cotangent)))
        assert {leaf.dtype for leaf in jax.tree.leaves(expected)} == {jnp.dtype("float64")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, expected)


def test_in_bfloat16_both_passes_see_the_same_scores():
    """Rounded, large ones are off by tenths; gradients of other scores than the forward pass's would be off by that."""

    def of_rounded_scores(query, key, value):
        scores = jnp.einsum("bhdk,bhdq->bhkq", key, query) * HEADS[2] ** -0.5
        scores += jax.lax.stop_gradient(jax.lax.reduce_precision(scores, 8, 7) - scores)
        return jnp.einsum("bhkq,bhdk->bhdq", jax.nn.softmax(scores, axis=2), value)

    rounded = [jnp.bfloat16(array) for array in random_heads(32, spread=6.0)]
    exact = [jnp.float32(array) for array in rounded]
    cotangent = jnp.bfloat16(np.random.default_rng(3).normal(size=exact[0].shape))
    results = {}
    for name, function, arguments in (
        ("written", lambda *parts: attention(*((part,) for part in parts))[0], rounded),
        ("plain", of_rounded_scores, exact),
    ):
        result, backward = jax.vjp(jax.jit(function), *arguments)
        results[name] = [jnp.float32(leaf) for leaf in (result, *backward(cotangent.astype(result.dtype)))]
    for actual, expected in zip(results["written"], results["plain"], strict=True):
        assert np.linalg.norm(actual - expected) < 0.02 * np.linalg.norm(expected)


def test_attention_to_very_different_scores_stays_finite():
    parts = tuple(jnp.full((1, 1, 2, 3), scale) for scale in (1.0, 60.0))
    result, backward = jax.vjp(attention, parts, parts, parts)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((result, backward(result))))


def test_only_causal_attention_keeps_later_positions_from_earlier_ones():
    query, key, value = (jnp.float32(array) for array in random_heads(7))
    changed = [array.at[..., 4:].add(1) for array in (key, value)]
    for visible in (None, jnp.asarray(CAUSAL)):
        (before,) = attention((query,), (key,), (value,), visible)
        (after,) = attention((query,), (changed[0],), (changed[1],), visible)
        assert (np.abs(before - after)[..., :4].max() == 0) == (visible is not None)
        assert np.abs(before - after)[..., 4:].max() > 1e-3
