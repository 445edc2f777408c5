"""Softmax attention with a hand-written gradient or by cuDNN, and its projections: queries, keys, values, output."""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from clip_jax.models.execution import Execution
from clip_jax.models.layers import Linear, matrix_product, shard_batch

Segments = tuple[jax.Array, ...]  # arrays that are attended to as if they were concatenated along the sequence


class QueryKeyValue(Linear):
    """The projection ``[W, 3 * W]`` to queries, keys and values, split into heads."""

    @nn.compact
    def __call__(self, x: jax.Array, num_heads: int, which: Sequence[int] = (0, 1, 2)) -> Segments:
        """Returns the requested ones of query (0), key (1) and value (2) of ``[B, L, W]``.

        Each is ``[B, heads, D, L]``, or ``[B, L, heads, D]`` for fused attention.
        """
        kernel, bias = self.parameters(x.shape[-1])
        split = into_heads_by_position if self.execution.fused_attention else into_heads
        projected = split(x, kernel, bias, num_heads, which, self.execution)
        return tuple(checkpoint_name(shard_batch(y, self.execution), "qkv") for y in projected)


class AttentionOutput(Linear):
    """The linear layer over the features of all heads."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[B, heads, D, L]``, or ``[B, L, heads, D]`` for fused attention, to ``[B, L, features]``."""
        if self.execution.fused_attention:
            x = x.reshape(*x.shape[:2], -1)  # [B, L, heads * D]
            kernel, bias = self.parameters(x.shape[-1])
            y = matrix_product(x, kernel, self.execution) + bias
        else:
            _, num_heads, head_width, _ = x.shape
            kernel, bias = self.parameters(num_heads * head_width)
            y = out_of_heads(x, kernel.reshape(num_heads, head_width, -1), self.execution) + bias
        return checkpoint_name(shard_batch(y, self.execution), "attention_output")


def into_heads(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, num_heads: int, which: Sequence[int], execution: Execution
) -> Segments:
    """Returns requested thirds of ``[B, L, W]`` times ``[W, 3 * W]`` plus ``[3 * W]``: ``[B, heads, D, L]`` each."""
    if execution.merge_leading_axes:
        # Always one product: to use a third of the kernel, it would first have to be copied.
        thirds = jnp.split(matrix_product(x, kernel, execution) + bias, 3, axis=2)
        return tuple(thirds[i].reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 3, 1) for i in which)
    kernel, bias = (array.reshape(*array.shape[:-1], 3, num_heads, -1) for array in (kernel, bias))
    return tuple(jnp.einsum("blw,whd->bhdl", x, kernel[:, i]) + bias[i, :, :, None] for i in which)


def out_of_heads(x: jax.Array, kernel: jax.Array, execution: Execution) -> jax.Array:
    """Returns ``[B, heads, D, L]`` times ``[heads, D, W]``: ``[B, L, W]``."""
    if not execution.merge_leading_axes:
        return jnp.einsum("bhdl,hdw->blw", x, kernel)
    batch, _, _, length = x.shape
    y = x.transpose(0, 3, 1, 2).reshape(batch * length, -1) @ kernel.reshape(-1, kernel.shape[-1])
    return y.reshape(batch, length, -1)


def into_heads_by_position(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, num_heads: int, which: Sequence[int], execution: Execution
) -> Segments:
    """Returns the same as :func:`into_heads`, but ``[B, L, heads, D]`` each.

    Each third is a product of its own, which saves a GPU copies out of a shared result and of gradients into one.
    """
    kernels, biases = jnp.split(kernel, 3, axis=1), jnp.split(bias, 3)
    thirds = (matrix_product(x, kernels[i], execution) + biases[i] for i in which)
    return tuple(y.reshape(*x.shape[:2], num_heads, -1) for y in thirds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(
    queries: Segments,
    keys: Segments,
    values: Segments,
    mask: jax.Array | None = None,
    sums_by_product: bool = False,
) -> Segments:
    """Softmax attention of all queries to all keys, as if the segments of each were one sequence.

    A TPU pads the last two axes of an array to multiples of 8 and 128. One sequence of a class token and 256 patches
    would cost as much as one of 384. Therefore each pair of segments has its own product of scores, and the softmax
    over all of them shares one maximum and one denominator. Scores have keys before queries, so that the softmax sums
    across vector registers, not within one.

    The gradient is written by hand. It saves the result and the logarithm of each query's denominator, and computes
    the exponentials of the scores again.

    Args:
      queries: ``[B, heads, D, Q]`` each.
      keys: ``[B, heads, D, K]`` each.
      values: of the same shapes as the keys.
      mask: bool, broadcast to ``[B, heads, K, Q]``: True where a query attends to a key. Only with one segment of
        queries and one of keys. None: each query attends to all keys.
      sums_by_product: see ``Execution.sums_by_product``.

    Returns:
      ``[B, heads, D, Q]`` for each segment of the queries, in its dtype. Scores are rounded to that dtype;
      exponentials are float32.

    Source: arXiv 2205.14135, section 3.1 and algorithm 4.
    """
    return _attention_forward(queries, keys, values, mask, sums_by_product)[0]


def _scaled(query: jax.Array) -> jax.Array:
    return query * query.shape[2] ** -0.5


def _scores(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    scores = jnp.einsum("bhdk,bhdq->bhkq", key, query)
    # XLA may leave out an implicit rounding; the forward and the backward pass would then have different scores.
    dtype = jnp.finfo(scores.dtype)
    scores = jax.lax.reduce_precision(scores, dtype.nexp, dtype.nmant).astype(jnp.float32)
    return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


def _sum(arrays: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, arrays)


def _mix(exponentials: jax.Array, value: jax.Array, sums_by_product: bool) -> tuple[jax.Array, jax.Array]:
    """Returns values ``[B, heads, D, K]`` times exponentials ``[B, heads, K, Q]``, and the sums over K, in float32."""
    if value.shape[3] == 1:
        return exponentials * value.astype(jnp.float32), exponentials
    if exponentials.shape[3] == 1 or not sums_by_product:
        mixed = jnp.einsum("bhkq,bhdk->bhdq", exponentials.astype(value.dtype), value)
        return mixed.astype(jnp.float32), exponentials.sum(axis=2, keepdims=True)
    # An additional feature of ones gives the sums in the same product, without another pass.
    value = jnp.concatenate([value, jnp.ones_like(value[:, :, :1])], axis=2)
    mixed = jnp.einsum("bhkq,bhdk->bhdq", exponentials.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return mixed[:, :, :-1], mixed[:, :, -1:]


def _attention_forward(queries, keys, values, mask, sums_by_product):
    results, log_sums = [], []
    for query in map(_scaled, queries):
        scores = [_scores(query, key, mask) for key in keys]
        highest = functools.reduce(jnp.maximum, (segment.max(axis=2, keepdims=True) for segment in scores))
        exponentials = [jnp.exp(segment - highest) for segment in scores]
        parts = [_mix(*pair, sums_by_product) for pair in zip(exponentials, values, strict=True)]
        mixed, total = jax.tree.map(lambda *terms: _sum(terms), *parts)
        results.append(checkpoint_name((mixed / total).astype(query.dtype), "attended"))
        log_sums.append(checkpoint_name(highest + jnp.log(total), "softmax_log_sum"))
    return tuple(results), (queries, keys, values, mask, tuple(results), tuple(log_sums))


def _attention_backward(sums_by_product, saved, gradients):
    queries, keys, values, mask, results, log_sums = saved
    dq = []
    dk, dv = ([[] for _ in keys] for _ in range(2))
    for query, result, log_sum, gradient in zip(map(_scaled, queries), results, log_sums, gradients, strict=True):
        # The gradient through the softmax's denominator: D in algorithm 4 of the paper.
        delta = (gradient.astype(jnp.float32) * result.astype(jnp.float32)).sum(axis=2, keepdims=True)
        dq_terms = []
        for segment, (key, value) in enumerate(zip(keys, values, strict=True)):
            probabilities = jnp.exp(_scores(query, key, mask) - log_sum)
            dp = jnp.einsum("bhdk,bhdq->bhkq", value, gradient).astype(jnp.float32)
            ds = (probabilities * (dp - delta)).astype(query.dtype)
            dv[segment].append(jnp.einsum("bhkq,bhdq->bhdk", probabilities.astype(query.dtype), gradient))
            dk[segment].append(jnp.einsum("bhkq,bhdq->bhdk", ds, query))
            dq_terms.append(jnp.einsum("bhkq,bhdk->bhdq", ds, key))
        dq.append(_scaled(_sum(dq_terms)))
    return tuple(dq), tuple(map(_sum, dk)), tuple(map(_sum, dv)), None


attention.defvjp(_attention_forward, _attention_backward)


FUSED_IMPLEMENTATION = "cudnn"  # of ``jax.nn.dot_product_attention``
FUSED_FORWARD = "dot_product_attention_fwd_wrapper"  # the JAX primitive whose results the gradient needs


class AttentionMask(NamedTuple):
    """Which keys a query attends to in :func:`fused_attention`. The default is all of them.

    Attributes:
      causal: only keys up to the query's own position.
      num_keys: int32 ``[B]``: only the first ``num_keys`` keys of a sequence.
      num_queries: int32 ``[B]``: how many queries a sequence has. If it is None, JAX creates this array itself, and
        does not split it over several devices.
      padded_from: the position of the first padded key; None if no key is padded.
    """

    causal: bool = False
    num_keys: jax.Array | None = None
    num_queries: jax.Array | None = None
    padded_from: int | None = None


def fused_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask) -> jax.Array:
    """Computes the same as :func:`attention` by cuDNN on a GPU, which stores no scores in memory in either pass.

    Args:
      query: bfloat16 ``[B, Q, heads, D]``; Q is even or 1, D is a multiple of 8 up to 128.
      key: bfloat16 ``[B, K, heads, D]``; K is even, which JAX requires for gradients.
      value: the same as the key.
      mask: which keys a query attends to.

    Returns:
      ``[B, Q, heads, D]``, in the query's dtype.
    """
    # Fusing the scores of a single query gains nothing.
    implementation = FUSED_IMPLEMENTATION if query.shape[1] > 1 else "xla"
    if mask.padded_from is not None:
        key, value = (without_gradient_from(x, mask.padded_from) for x in (key, value))
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=mask.causal,
        query_seq_lengths=mask.num_queries,
        key_value_seq_lengths=mask.num_keys,
        implementation=implementation,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def without_gradient_from(x: jax.Array, position: int) -> jax.Array:
    """Returns ``[B, K, heads, D]`` unchanged; the gradient is zero from ``position`` on.

    cuDNN may leave the gradients of keys beyond a sequence's length uninitialized (openxla/xla#44867).
    """
    return x


without_gradient_from.defvjp(
    lambda x, position: (x, None), lambda position, _, gradient: (gradient.at[:, position:].set(0),)
)
