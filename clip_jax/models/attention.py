"""Softmax attention, its gradient written out or fused in cuDNN, and the projections into heads and out of them."""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from clip_jax.models.layers import Linear, matrix_product, shard_batch

Parts = tuple[jax.Array, ...]  # of sequences that attend to one another as if they were one


class QueryKeyValue(Linear):
    """The projections ``[W, 3 * W]`` of a block, split into heads as :func:`attention` or the fused one takes them."""

    @nn.compact
    def __call__(self, x: jax.Array, num_heads: int, which: Sequence[int] = (0, 1, 2)) -> Parts:
        """``[B, L, W]`` to those of query (0), key (1) and value (2) that are asked for, ``[B, heads, D, L]`` each.

        For fused attention they are ``[B, L, heads, D]``.
        """
        kernel, bias = self.parameters(x.shape[-1])
        split = into_heads_by_position if self.execution.fused_attention else into_heads
        projected = split(x, kernel, bias, num_heads, which)
        return tuple(checkpoint_name(shard_batch(y, self.execution), "qkv") for y in projected)


class AttentionOutput(Linear):
    """A linear layer over all heads' features, from what either form of attention returns to ``[B, L, features]``."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From ``[B, heads, D, L]``, or from ``[B, L, heads, D]`` for fused attention."""
        if self.execution.fused_attention:
            x = x.reshape(*x.shape[:2], -1)  # [B, L, heads * D]
            kernel, bias = self.parameters(x.shape[-1])
            y = matrix_product(x, kernel) + bias
        else:
            _, num_heads, head_width, _ = x.shape
            kernel, bias = self.parameters(num_heads * head_width)
            y = out_of_heads(x, kernel.reshape(num_heads, head_width, -1)) + bias
        return checkpoint_name(shard_batch(y, self.execution), "attention_output")


# On CPU products are of plain matrices, as in ``layers.matrix_product`` and chosen where it is, for the same reason.


def into_heads(x: jax.Array, kernel: jax.Array, bias: jax.Array, num_heads: int, which: Sequence[int]) -> Parts:
    """``[B, L, W]`` times ``[W, 3 * W]`` plus ``[3 * W]``: those thirds that are asked for, ``[B, heads, D, L]``."""

    def merged(x, kernel, bias):
        # One product whatever is asked for: a third of the kernel would have to be copied out of it.
        y = matrix_product(x, kernel) + bias
        thirds = jnp.split(y, 3, axis=2)
        return tuple(thirds[i].reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 3, 1) for i in which)

    def apart(x, kernel, bias):
        kernel, bias = (array.reshape(*array.shape[:-1], 3, num_heads, -1) for array in (kernel, bias))
        return tuple(jnp.einsum("blw,whd->bhdl", x, kernel[:, i]) + bias[i, :, :, None] for i in which)

    return jax.lax.platform_dependent(x, kernel, bias, cpu=merged, default=apart)


def out_of_heads(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[B, heads, D, L]`` times ``[heads, D, W]``, as ``[B, L, W]``."""

    def merged(x, kernel):
        batch, _, _, length = x.shape
        y = x.transpose(0, 3, 1, 2).reshape(batch * length, -1) @ kernel.reshape(-1, kernel.shape[-1])
        return y.reshape(batch, length, -1)

    return jax.lax.platform_dependent(
        x, kernel, cpu=merged, default=lambda x, kernel: jnp.einsum("bhdl,hdw->blw", x, kernel)
    )


def into_heads_by_position(x: jax.Array, kernel: jax.Array, bias: jax.Array, num_heads: int, which: Sequence[int]):
    """The same as :func:`into_heads`, ``[B, L, heads, D]`` each.

    On a GPU a product each, so that none has to be copied out of a common result, nor the gradients into one.
    """
    kernels, biases = jnp.split(kernel, 3, axis=1), jnp.split(bias, 3)
    thirds = (matrix_product(x, kernels[i]) + biases[i] for i in which)
    return tuple(y.reshape(*x.shape[:2], num_heads, -1) for y in thirds)


@jax.custom_vjp
def attention(queries: Parts, keys: Parts, values: Parts, visible: jax.Array | None = None) -> Parts:
    """Softmax attention of all queries to all keys, as if the parts of each stood in one sequence.

    Written for a TPU, which pads the last two axes of every array to multiples of 8 and 128: 256 patches and a class
    token in one sequence make a product of scores as large as one of 384, so each pair of parts has a product of its
    own and the softmax over them shares one maximum and one denominator. Scores have keys before queries: what the
    softmax sums lies across vector registers, not within one. The gradient is written out. It keeps what came out
    and the logarithm of each query's denominator, from which the scores' exponentials alone have to be computed again
    (as in arXiv 2205.14135, section 3.1 and algorithm 4).

    Args:
      queries: ``[B, heads, D, Q]`` each.
      keys: ``[B, heads, D, K]`` each.
      values: of the same shapes.
      visible: bool, to be broadcast to ``[B, heads, K, Q]``: which keys a query sees; of a single part each. All of
        them if None.

    Returns:
      ``[B, heads, D, Q]`` for each part of the queries, in its dtype. Scores are rounded to it, exponentials float32.
    """
    return _attention_forward(queries, keys, values, visible)[0]


def _scaled(query: jax.Array) -> jax.Array:
    return query * query.shape[2] ** -0.5


def _scores(query: jax.Array, key: jax.Array, visible: jax.Array | None) -> jax.Array:
    scores = jnp.einsum("bhdk,bhdq->bhkq", key, query)
    # Said explicitly: where XLA is free to leave the rounding out, forward and backward pass would see other scores.
    dtype = jnp.finfo(scores.dtype)
    scores = jax.lax.reduce_precision(scores, dtype.nexp, dtype.nmant).astype(jnp.float32)
    return scores if visible is None else jnp.where(visible, scores, -jnp.inf)


def _sum(arrays: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, arrays)


def _mix(exponentials: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The values ``[B, heads, D, K]`` by exponentials ``[B, heads, K, Q]``, and the sums of these, in float32."""

    def summed(exponentials, value):
        mixed = jnp.einsum("bhkq,bhdk->bhdq", exponentials.astype(value.dtype), value)
        return mixed.astype(jnp.float32), exponentials.sum(axis=2, keepdims=True)

    def with_ones(exponentials, value):
        # One feature more, of ones, makes the sums in the same product instead of in another pass.
        value = jnp.concatenate([value, jnp.ones_like(value[:, :, :1])], axis=2)
        mixed = jnp.einsum(
            "bhkq,bhdk->bhdq", exponentials.astype(value.dtype), value, preferred_element_type=jnp.float32
        )
        return mixed[:, :, :-1], mixed[:, :, -1:]

    if value.shape[3] == 1:
        return exponentials * value.astype(jnp.float32), exponentials
    if exponentials.shape[3] == 1:
        return summed(exponentials, value)
    # Chosen where the program is lowered, as in ``layers.matrix_product``.
    return jax.lax.platform_dependent(exponentials, value, cpu=summed, default=with_ones)


def _attention_forward(queries, keys, values, visible):
    results, log_sums = [], []
    for query in map(_scaled, queries):
        scores = [_scores(query, key, visible) for key in keys]
        highest = functools.reduce(jnp.maximum, (part.max(axis=2, keepdims=True) for part in scores))
        exponentials = [jnp.exp(part - highest) for part in scores]
        mixed, total = jax.tree.map(lambda *parts: _sum(parts), *map(_mix, exponentials, values))
        results.append(checkpoint_name((mixed / total).astype(query.dtype), "attended"))
        log_sums.append(checkpoint_name(highest + jnp.log(total), "softmax_log_sum"))
    return tuple(results), (queries, keys, values, visible, tuple(results), tuple(log_sums))


def _attention_backward(saved, gradients):
    queries, keys, values, visible, results, log_sums = saved
    by_query = []
    by_key, by_value = ([[] for _ in keys] for _ in range(2))
    for query, result, log_sum, gradient in zip(map(_scaled, queries), results, log_sums, gradients, strict=True):
        # What a probability's gradient loses through the denominator: D of the paper's algorithm 4.
        along = (gradient.astype(jnp.float32) * result.astype(jnp.float32)).sum(axis=2, keepdims=True)
        through_keys = []
        for part, (key, value) in enumerate(zip(keys, values, strict=True)):
            probabilities = jnp.exp(_scores(query, key, visible) - log_sum)
            by_probability = jnp.einsum("bhdk,bhdq->bhkq", value, gradient).astype(jnp.float32)
            by_score = (probabilities * (by_probability - along)).astype(query.dtype)
            by_value[part].append(jnp.einsum("bhkq,bhdq->bhdk", probabilities.astype(query.dtype), gradient))
            by_key[part].append(jnp.einsum("bhkq,bhdq->bhdk", by_score, query))
            through_keys.append(jnp.einsum("bhkq,bhdk->bhdq", by_score, key))
        by_query.append(_scaled(_sum(through_keys)))
    return tuple(by_query), tuple(map(_sum, by_key)), tuple(map(_sum, by_value)), None


attention.defvjp(_attention_forward, _attention_backward)


FUSED_IMPLEMENTATION = "cudnn"  # of ``jax.nn.dot_product_attention``
FUSED_FORWARD = "dot_product_attention_fwd_wrapper"  # JAX's primitive, whose results its gradient needs


class AttentionMask(NamedTuple):
    """Which keys a query sees in :func:`fused_attention`.

    With ``causal`` those up to its own position; with ``num_keys`` int32 ``[B]`` the first so many of its sequence.
    ``padded_from`` is where keys begin that no query sees, if there are any. ``num_queries`` int32 ``[B]`` may say how
    many queries there are: on several devices JAX would not split the numbers that it makes itself.
    """

    causal: bool = False
    num_keys: jax.Array | None = None
    num_queries: jax.Array | None = None
    padded_from: int | None = None


def fused_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask) -> jax.Array:
    """The same function as :func:`attention`, by cuDNN on a GPU: no scores come to memory, in either direction.

    Args:
      query: bfloat16 ``[B, Q, heads, D]``; Q is even or 1, D a multiple of 8 up to 128.
      key: ``[B, K, heads, D]``; K is even, which JAX asks for where there is a gradient.
      value: the same.
      mask: which keys a query sees.

    Returns:
      ``[B, Q, heads, D]``, in the query's dtype.
    """
    # One query has no scores worth fusing.
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
    """``[B, K, heads, D]`` as it is, its gradient zero from a position on.

    cuDNN may leave the gradients of keys beyond a sequence's length as it found their memory (openxla/xla#44867).
    """
    return x


without_gradient_from.defvjp(
    lambda x, position: (x, None), lambda position, _, gradient: (gradient.at[:, position:].set(0),)
)
