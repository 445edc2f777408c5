"""Embeds any number of images and texts in fixed-size batches over all devices of all hosts."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clip_jax.data.tokenizer import tokenize
from clip_jax.evaluation.images import all_gather_objects, raise_first
from clip_jax.models.clip import CLIP, normalize_images
from clip_jax.sharding import batch_sharding, replicated

TOKENS_UNIT = 8  # texts are padded to a multiple of it, so that few lengths have to be compiled
BATCH_FACTOR = 8  # between the sizes of batches that are compiled


class Embedder:
    """A model as functions of numpy arrays, compiled for a few batch sizes and text lengths only.

    The last, incomplete batch is padded with zeros and the padding cut off again, so nothing is dropped or counted
    twice. An input that is shorter than a batch goes in smaller batches (see :func:`batch_size_for`). Every host calls
    with the same input and gets the whole result; a host asks the input only for the rows that its own devices embed.
    """

    def __init__(self, model: CLIP, mesh: Mesh, batch_size: int, before_batch: Callable[[], None] = lambda: None):
        """``before_batch`` is called before each batch, on all hosts as often; it may raise, to end an evaluation."""
        self._variables: dict | None = None
        self._before_batch = before_batch
        self._mesh = mesh
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._context_length = model.preset.text.context_length
        preprocessing = model.preset.preprocessing
        last = model.preset.vision.feature_layer

        def image_features(variables: dict, images: jax.Array) -> jax.Array:
            _, captured = model.apply(
                variables,
                normalize_images(images, preprocessing),
                method="encode_image",
                capture_intermediates=lambda module, _: module.name == last,
                mutable=["intermediates"],
            )
            (features,) = jax.tree.leaves(captured)
            return features.astype(jnp.float32)

        def compiled(function: Callable) -> Callable:
            return jax.jit(function, out_shardings=replicated(mesh))

        def encode_image(variables: dict, images: jax.Array) -> jax.Array:
            return model.apply(variables, normalize_images(images, preprocessing), method="encode_image")

        self._encode_image = compiled(encode_image)
        self._image_features = compiled(image_features)
        self._encode_text = compiled(lambda variables, tokens: model.apply(variables, tokens, method="encode_text"))

    def set_variables(self, variables: dict) -> "Embedder":
        """Sets the ``params`` and ``batch_stats`` to embed with; nothing is compiled again."""
        self._variables = variables
        return self

    @property
    def mesh(self) -> Mesh:
        return self._mesh

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by."""
        return float(np.exp(self._variables["params"]["logit_scale"]))

    def encode_image(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 ``[M, S, S, 3]`` to image_embeddings float32 ``[M, D]`` of unit length.

        ``images`` is an array, or :class:`clip_jax.evaluation.images.Images`. Raises ValueError on all hosts where
        an image cannot be read on one.
        """
        return self._in_batches(self._encode_image, images)

    def image_features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the features used by a linear probe, float32 ``[M, W]``, not of unit length.

        They are the output of the image tower's ``feature_layer``.
        """
        return self._in_batches(self._image_features, images)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """M texts, cut where they are too long, to text_embeddings float32 ``[M, D]`` of unit length."""
        return self.encode_tokens(tokenize(list(texts), self._context_length, truncate=True))

    def encode_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens int32 ``[M, L]`` to text_embeddings float32 ``[M, D]`` of unit length.

        L is at most context_length, except for columns after the end of every text.
        """
        # No token sees what comes after it, so what follows the longest text's end changes nothing.
        longest = int(tokens.argmax(axis=1).max()) + 1
        length = -(-longest // TOKENS_UNIT) * TOKENS_UNIT
        if len(tokens) <= self._batch_size:  # compiling one more length would cost more than the longer texts
            length = max(TOKENS_UNIT, 1 << (longest - 1).bit_length())
        length = min(length, self._context_length)
        padded = np.zeros((len(tokens), length), np.int32)
        padded[:, : tokens.shape[1]] = tokens[:, :length]
        return self._in_batches(self._encode_text, padded)

    def _in_batches(self, encode: Callable, rows: Sequence[np.ndarray]) -> np.ndarray:
        sharding, first = batch_sharding(self._mesh), _like_a_row(rows)
        batch_size = batch_size_for(len(rows), self._batch_size, self._mesh.size)
        results, under_way, problems = [], None, []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(rows), batch_size):
                self._before_batch()

                def part(index: tuple[slice, ...], start: int = start) -> np.ndarray:
                    """One device's rows of this batch, zeros where there are none left."""
                    begin, end, _ = index[0].indices(batch_size)
                    result = np.zeros((end - begin, *first.shape), first.dtype)
                    wanted = range(start + begin, min(start + end, len(rows)))
                    if isinstance(rows, np.ndarray):
                        result[: len(wanted)] = rows[wanted.start : wanted.stop]
                    else:
                        try:
                            for place, row in enumerate(pool.map(rows.__getitem__, wanted)):
                                result[place] = row
                        except (ValueError, OSError) as error:
                            problems.append(str(error))  # reported at the end: other hosts wait for this batch
                    return result

                batch = jax.make_array_from_callback((batch_size, *first.shape), sharding, part)
                result = encode(self._variables, batch)
                if under_way is not None:  # read one batch late: the next is prepared while this one is embedded
                    results.append(np.asarray(under_way))
                under_way = result
        results.append(np.asarray(under_way))
        raise_first([problem for of_host in all_gather_objects(problems) for problem in of_host])
        return np.concatenate(results)[: len(rows)]


def batch_size_for(rows: int, largest: int, devices: int) -> int:
    """Returns the largest of a few batch sizes whose padding at most doubles the number of rows.

    The sizes are 1, 8, 64, ... rows on each device, below ``largest``, and ``largest`` itself. With batches of 64, any
    number of rows needs at most three compiled programs, and a single row is not padded.
    """
    sizes = [largest]
    smaller = devices
    while smaller < largest:
        sizes.append(smaller)
        smaller *= BATCH_FACTOR
    padded = {size: -(-rows // size) * size for size in sizes}
    return max(size for size in sizes if padded[size] <= 2 * max(rows, devices))


def _like_a_row(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Of the shape and dtype of each of them."""
    return rows[0] if isinstance(rows, np.ndarray) else rows.blank_image
