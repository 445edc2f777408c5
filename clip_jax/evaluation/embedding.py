"""Embeds any number of images and texts in fixed-size batches over all devices."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax.data.tokenizer import tokenize
from clip_jax.models.clip import CLIP, normalize_images
from clip_jax.training.sharding import batch_sharding, replicated


class Embedder:
    """A model as two functions of numpy arrays, compiled once for each batch size that occurs.

    The last, incomplete batch is padded with zeros and the padding cut off again, so nothing is dropped or counted
    twice. An input that is shorter than a batch is padded to a power of two only, so that one picture costs about what
    one picture costs. Every host calls with the same input and gets the whole result.
    """

    def __init__(self, model: CLIP, mesh: Mesh, batch_size: int):
        self._variables: dict | None = None
        self._mesh = mesh
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._context_length = model.preset.text.context_length

        def compiled(function: Callable) -> Callable:
            return jax.jit(function, out_shardings=replicated(mesh))

        self._encode_image = compiled(
            lambda variables, images: model.apply(variables, normalize_images(images), method="encode_image")
        )
        self._encode_text = compiled(lambda variables, tokens: model.apply(variables, tokens, method="encode_text"))

    def with_variables(self, variables: dict) -> "Embedder":
        """Sets the ``params`` and ``batch_stats`` to embed with; nothing is compiled again."""
        self._variables = variables
        return self

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """uint8 ``[M, S, S, 3]`` to image_embeddings float32 ``[M, D]`` of unit length."""
        return self._in_batches(self._encode_image, images)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """M texts, cut where they are too long, to text_embeddings float32 ``[M, D]`` of unit length."""
        return self.encode_tokens(tokenize(list(texts), self._context_length, truncate=True))

    def encode_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens int32 ``[M, L]``, L at most context_length, to text_embeddings float32 ``[M, D]`` of unit length."""
        return self._in_batches(self._encode_text, tokens)

    def _in_batches(self, encode: Callable, array: np.ndarray) -> np.ndarray:
        results = []
        sharding = batch_sharding(self._mesh)
        needed = -(-len(array) // self._mesh.size)
        batch_size = min(self._batch_size, self._mesh.size << (needed - 1).bit_length())
        for start in range(0, len(array), batch_size):
            rows = array[start : start + batch_size]
            padded = np.zeros((batch_size, *array.shape[1:]), array.dtype)
            padded[: len(rows)] = rows
            batch = jax.make_array_from_callback(padded.shape, sharding, lambda index, padded=padded: padded[index])
            results.append(np.asarray(encode(self._variables, batch))[: len(rows)])
        return np.concatenate(results)
