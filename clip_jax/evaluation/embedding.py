"""Embeds any number of images and texts in fixed-size batches over all devices."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax.data.tokenizer import tokenize
from clip_jax.models.clip import CLIP, normalize_images
from clip_jax.training.sharding import batch_sharding, replicated


class Embedder:
    """A model as two functions of numpy arrays; each compiles once.

    The last, incomplete batch is padded with zeros and the padding cut off again, so nothing is dropped or counted
    twice. Every host calls with the same input and gets the whole result.
    """

    def __init__(self, model: CLIP, mesh: Mesh, batch_size: int):
        self._params: dict | None = None
        self._mesh = mesh
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._context_length = model.preset.text.context_length

        def compiled(function: Callable) -> Callable:
            return jax.jit(function, out_shardings=replicated(mesh))

        self._encode_image = compiled(
            lambda params, images: model.apply({"params": params}, normalize_images(images), method="encode_image")
        )
        self._encode_text = compiled(
            lambda params, tokens: model.apply({"params": params}, tokens, method="encode_text")
        )

    def with_params(self, params: dict) -> "Embedder":
        """Sets the parameters to embed with; nothing is compiled again."""
        self._params = params
        return self

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """uint8 ``[M, S, S, 3]`` to image_embeddings float32 ``[M, D]`` of unit length."""
        return self._in_batches(self._encode_image, images)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """M texts, cut where they are too long, to text_embeddings float32 ``[M, D]`` of unit length."""
        return self._in_batches(self._encode_text, tokenize(list(texts), self._context_length, truncate=True))

    def _in_batches(self, encode: Callable, array: np.ndarray) -> np.ndarray:
        results = []
        sharding = batch_sharding(self._mesh)
        for start in range(0, len(array), self._batch_size):
            rows = array[start : start + self._batch_size]
            padded = np.zeros((self._batch_size, *array.shape[1:]), array.dtype)
            padded[: len(rows)] = rows
            batch = jax.make_array_from_callback(padded.shape, sharding, lambda index, padded=padded: padded[index])
            results.append(np.asarray(encode(self._params, batch))[: len(rows)])
        return np.concatenate(results)
