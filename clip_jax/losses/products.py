"""How the losses multiply float32 matrices on each kind of device."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clip_jax.models.execution import execution_on


class Products(NamedTuple):
    """Two matrix products of float32 arrays: of embeddings, and of the logits' gradients with embeddings.

    JAX differentiates the gathered form of the softmax loss, so its gradients use ``embeddings``, too.
    """

    embeddings: Callable[[jax.Array, jax.Array], jax.Array]
    logit_gradients: Callable[[jax.Array, jax.Array], jax.Array]


def products_on(mesh: Mesh, dtype: jnp.dtype) -> Products:
    """The products for the mesh's devices: in float32, or on recent GPUs in types that their matrix units support.

    A TPU's default would round the operands of the similarities to bfloat16, an error of 0.4 % of a logit of 100. TF32
    rounds them to 11 bits, an eighth of that error. The logits' gradients may be rounded to bfloat16 if the embeddings'
    gradients are, too.

    Args:
      mesh: the devices that compute the loss.
      dtype: the dtype that the towers compute in. They round the gradients of their embeddings to it.
    """
    execution = execution_on(mesh.devices.flat[0])
    rounded = jnp.dtype(dtype) == jnp.bfloat16
    of_gradients = execution.embedding_gradient_precision if rounded else execution.similarity_precision
    return Products(
        *(
            functools.partial(jnp.matmul, precision=precision)
            for precision in (execution.similarity_precision, of_gradients)
        )
    )
