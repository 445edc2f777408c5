"""Measures two optimizations for CPU: LayerNorm's hand-written gradient, and matrix products with merged batch axes.

    python -m benchmarks.cpu_gradients

The peers are the plain forms with automatic differentiation, alternating in the same run. Prints the median time of
value and gradients for 256 x 37 tokens of width 192, and the ratios.
"""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from clip_jax.models.execution import Execution
from clip_jax.models.layers import layer_norm, matrix_product

ROUNDS = 15


def plain_layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.square(centered).mean(axis=-1, keepdims=True) + 1e-5) * scale + bias


def compiled_gradient(function: Callable, *arguments: jax.Array) -> Callable[[], None]:
    every = tuple(range(len(arguments)))
    gradient = jax.jit(jax.value_and_grad(lambda *arguments: jnp.square(function(*arguments)).sum(), every))
    return lambda: jax.block_until_ready(gradient(*arguments))


def compare(name: str, ours: Callable, plain: Callable, *arguments: jax.Array) -> None:
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    runs = {"ours": compiled_gradient(ours, *arguments), "plain": compiled_gradient(plain, *arguments)}
    for run in runs.values():
        run()
    for _ in range(ROUNDS):
        for form, run in runs.items():
            start = time.perf_counter()
            run()
            times[form].append(time.perf_counter() - start)
    ours_ms, plain_ms = (1e3 * statistics.median(times[form]) for form in ("ours", "plain"))
    print(f"{name}: {ours_ms:.1f} ms, plain {plain_ms:.1f} ms, ratio {plain_ms / ours_ms:.2f}")


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (256, 37, 192))
    kernel = jax.random.normal(keys[1], (192, 768))
    compare("LayerNorm", layer_norm, plain_layer_norm, x, jnp.ones(192), jnp.zeros(192))
    merged = functools.partial(matrix_product, execution=Execution(merge_leading_axes=True))
    compare("matrix product", merged, jnp.matmul, x, kernel)


if __name__ == "__main__":
    main()
