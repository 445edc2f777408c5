"""Loads a trained model as a Python object that embeds images and texts, and classifies images by labels."""

import dataclasses
import itertools
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np
from PIL import Image

from clip_jax.data.images import MAX_ASPECT_RATIO, MAX_PIXELS, ImageError, decode_image, evaluation_transform, to_rgb
from clip_jax.data.tokenizer import VOCAB_SIZE, tokenize
from clip_jax.errors import one_line
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.zero_shot import classifier_weights
from clip_jax.models.clip import CLIP, loss_parameters_of
from clip_jax.models.execution import choose_execution
from clip_jax.models.presets import CLIPPreset
from clip_jax.models.transformer import unstack_layers
from clip_jax.settings import DTYPES
from clip_jax.sharding import make_mesh
from clip_jax.training.state import place_variables
from clip_jax.weights import Weights, digest_of, preset_name, read_weights


class Array(Protocol):
    """An array of NumPy or JAX, or a tensor of PyTorch."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> Any: ...


ImageInput = Image.Image | Array | str | bytes | os.PathLike

PREPROCESSINGS = ("clip_jax", "openai")

logger = logging.getLogger("clip_jax")


class LoadedModel:
    """A trained model, returned by :func:`load`.

    Attributes:
      preset: the architecture.
      logit_scale: the learned factor of cosines.
      embedder: embeds prepared images (uint8) and tokens.
      max_pixels: larger images are refused before they are decoded. Can be changed; Pillow refuses images of more than
        twice ``PIL.Image.MAX_IMAGE_PIXELS`` by itself.
      max_aspect_ratio: images whose long side is more than this many times the short side are refused. Can be changed.
    """

    preset: CLIPPreset
    logit_scale: float
    embedder: Embedder
    max_pixels: int
    max_aspect_ratio: float

    def __init__(self, weights: Weights, batch_size: int, dtype: str, preprocessing: str = PREPROCESSINGS[0]):
        mesh = make_mesh(fsdp=1)
        execution = choose_execution(mesh, weights.preset.fused_head_widths, dtype, scan_unroll=1)
        model = CLIP(
            weights.preset,
            dataclasses.replace(execution, scan_layers=False),
            # Only logit_scale is used. The others, such as a bias, are the same for all labels; they are kept.
            loss_parameters=loss_parameters_of(weights.variables["params"]),
        )
        variables = place_variables(unstack_layers(weights.variables), model, mesh)
        self.preset = weights.preset
        self.logit_scale = float(np.exp(variables["params"]["logit_scale"]))
        self.embedder = Embedder(model, mesh, batch_size).set_variables(variables)
        self.max_pixels, self.max_aspect_ratio = MAX_PIXELS, MAX_ASPECT_RATIO
        self._variables, self._batch_size, self._dtype, self._format = variables, batch_size, dtype, weights.format
        self._as_stored = preprocessing == "openai"

    def __repr__(self) -> str:
        vision, text = self.preset.vision, self.preset.text
        name = f"{self.name} ({vision.title})" if self.name == "custom" else self.name
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self._variables["params"]))
        return (
            f"<clip_jax model {name}: {parameters:,} parameters, images {vision.image_size} x {vision.image_size}, "
            f"texts of {text.context_length} tokens, embeddings of {self.preset.embed_dim}, {self._dtype}, "
            f"from {self._format}>"
        )

    @property
    def name(self) -> str:
        """The name of the preset with this architecture, or "custom"."""
        return preset_name(self.preset)

    @property
    def digest(self) -> str:
        """A digest of the parameters, which differs between models."""
        return digest_of(self._variables)

    def encode_image(self, images: ImageInput | Iterable[ImageInput]) -> np.ndarray:
        """Returns the embeddings of M images, float32 ``[M, D]`` of unit length.

        Images are prepared as ``preset.preprocessing`` states, and read in batches: any number of paths takes the
        memory of two batches.

        Args:
          images: one image or an iterable of them. An image is a path, a Pillow image, or an array uint8 ``[H, W, 3]``
            (``[H, W]`` for gray, ``[H, W, 4]`` with alpha) of NumPy, JAX or PyTorch. An array ``[M, H, W, 3]`` is M
            images.

        Raises:
          TypeError: an image has another type.
          ValueError: an image cannot be decoded or is outside the limits, or an array is not uint8 ``[H, W, 3]``.
          FileNotFoundError: a path does not exist.
          FloatingPointError: the embeddings are not finite, since the parameters are damaged.
        """
        embeddings = [np.zeros((0, self.preset.embed_dim), np.float32)]
        for batch in self._read(images):
            embeddings.append(_finite(self.embedder.encode_image(np.stack([_or_raise(pixels) for pixels in batch]))))
        return np.concatenate(embeddings)

    def tokenize(self, texts: str | Iterable[str]) -> np.ndarray:
        """Returns the tokens of M texts, int32 ``[M, L]``, L the model's context length. Longer texts are cut.

        Raises:
          TypeError: a text is not a string.
          ValueError: the model's vocabulary is smaller than the tokenizer's.
        """
        if self.preset.text.vocab_size < VOCAB_SIZE:
            size = self.preset.text.vocab_size
            raise ValueError(f"the model's vocabulary of {size:,} is not the tokenizer's; give tokens instead of texts")
        return tokenize(_texts(texts), self.preset.text.context_length, truncate=True)

    def encode_text(self, texts: str | Iterable[str] | Array) -> np.ndarray:
        """Returns the embeddings of M texts, float32 ``[M, D]`` of unit length.

        Args:
          texts: one text or an iterable of them, which are cut if they are too long; or tokens ``[M, L]`` of
            :meth:`tokenize`, as an array of NumPy, JAX or PyTorch. L may exceed the model's context length if every
            text ends within it, so the 77 tokens of :func:`clip_jax.tokenize` fit a model with a shorter context.

        Raises:
          TypeError: a text is not a string.
          ValueError: tokens are not integers of the vocabulary, or do not fit the context; or texts were given to a
            model whose vocabulary is smaller than the tokenizer's.
          FloatingPointError: as :meth:`encode_image`.
        """
        tokens = self._checked_tokens(texts) if _is_array(texts) else self.tokenize(texts)
        if not len(tokens):
            return np.zeros((0, self.preset.embed_dim), np.float32)
        return _finite(self.embedder.encode_tokens(tokens))

    def classify(
        self,
        images: ImageInput | Iterable[ImageInput],
        labels: str | Iterable[str],
        templates: str | Iterable[str] = ("{}",),
    ) -> np.ndarray:
        """Returns the probabilities of C labels for M images, float32 ``[M, C]``, as in figure 1 of the paper.

        Args:
          images: as in :meth:`encode_image`.
          labels: C texts.
          templates: sentences with ``{}`` for the label. Their embeddings are averaged (section 3.1.4).

        Raises:
          TypeError: a label or a template is not a string; or as :meth:`encode_image`.
          ValueError: there are no labels, one is empty or repeated, or a template has no ``{}``; or as
            :meth:`encode_image`.
        """
        labels = _texts(labels)
        rows = [_or_raise(row) for row in self.classify_each(images, labels, templates)]
        return np.stack(rows) if rows else np.zeros((0, len(labels)), np.float32)

    def classify_each(
        self,
        images: ImageInput | Iterable[ImageInput],
        labels: str | Iterable[str],
        templates: str | Iterable[str] = ("{}",),
    ) -> Iterator[np.ndarray | Exception]:
        """Yields for each image its probabilities float32 ``[C]``, or the error if it cannot be used.

        The arguments are those of :meth:`classify`. The iterator reads at most two batches of images ahead.

        Raises:
          TypeError, ValueError: the labels or templates are wrong, as in :meth:`classify`.
          FloatingPointError: the embeddings are not finite, since the parameters are damaged.
        """
        weights = self._classifier(_texts(labels), _texts(templates))  # [C, D]

        def each() -> Iterator[np.ndarray | Exception]:
            for batch in self._read(images):
                good = [pixels for pixels in batch if isinstance(pixels, np.ndarray)]
                embeddings = self.embedder.encode_image(np.stack(good)) if good else np.zeros((0, weights.shape[1]))
                rows = iter(_softmax(_finite(self.logit_scale * embeddings @ weights.T)))
                yield from (next(rows) if isinstance(pixels, np.ndarray) else pixels for pixels in batch)

        return each()

    def _classifier(self, labels: list[str], templates: list[str]) -> np.ndarray:
        if not labels or not templates:
            raise ValueError("classify needs at least one label and one template")
        for kind, texts in (("labels", labels), ("templates", templates)):
            for index, text in enumerate(texts):
                if not isinstance(text, str):
                    raise TypeError(f"{kind}[{index}] is {type(text).__name__}, not str")
        seen: dict[str, int] = {}
        for index, label in enumerate(labels):
            if not label.strip():
                raise ValueError(f"labels[{index}] is empty")
            if seen.setdefault(label, index) != index:
                raise ValueError(
                    f"labels[{index}] repeats {label!r}: the two would share its probability; give it once"
                )
        without = [template for template in templates if "{}" not in template]
        if without:
            raise ValueError(f"template {without[0]!r} has no {{}} for the label")
        return classifier_weights(self.encode_text, labels, templates)

    def _checked_tokens(self, array: object) -> np.ndarray:
        text = self.preset.text
        tokens = np.atleast_2d(_as_numpy(array))
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.shape[1]:
            raise ValueError(
                f"tokens must be integers [M, L] with L at most {text.context_length}, not {tokens.dtype} "
                f"{list(tokens.shape)}"
            )
        if tokens.size and (tokens.min() < 0 or tokens.max() >= text.vocab_size):
            raise ValueError(f"tokens must be in [0, {text.vocab_size}), not in [{tokens.min()}, {tokens.max()}]")
        if tokens.shape[1] > text.context_length:
            # A text's embedding is read at its greatest id, the end of the text. No token after that changes it.
            late = np.flatnonzero((tokens.argmax(axis=1) >= text.context_length) | ~tokens.any(axis=1))
            if late.size:
                raise ValueError(
                    f"tokens must be integers [M, L] with L at most {text.context_length}: row {late[0]} of "
                    f"{tokens.shape[1]} does not end before that; make them with model.tokenize(texts), which cuts them"
                )
        return tokens[:, : text.context_length].astype(np.int32)

    def _read(self, images: ImageInput | Iterable[ImageInput]) -> Iterator[list[np.ndarray | Exception]]:
        """Yields batches of uint8 ``[S, S, 3]``, or errors. Reads the next batch while one is used."""
        inputs = iter(_image_inputs(images))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ahead: list[Future | np.ndarray | Exception] = []
            while True:
                batch, ahead = ahead, []
                for image_input in itertools.islice(inputs, self._batch_size):
                    # Pillow reads files lazily, and the same image may occur twice: two threads must not read it.
                    now = isinstance(image_input, Image.Image)
                    ahead.append(self._attempt(image_input) if now else pool.submit(self._attempt, image_input))
                if batch:
                    yield [item.result() if isinstance(item, Future) else item for item in batch]
                if not ahead:
                    return

    def _prepared(self, image_input: ImageInput, image: Image.Image) -> np.ndarray:
        try:
            return evaluation_transform(image, self.preset.vision.image_size, self.preset.preprocessing)
        except ValueError as error:  # Pillow cannot resize or convert its mode
            name = os.fsdecode(image_input) if isinstance(image_input, str | bytes | os.PathLike) else "an image"
            raise ImageError(f"{name}: mode {image.mode}: {error}") from None

    def _attempt(self, image_input: ImageInput) -> np.ndarray | Exception:
        try:
            image = _open(image_input, self.max_pixels, self.max_aspect_ratio, self._as_stored)
            return self._prepared(image_input, image)
        except (TypeError, ValueError, OSError) as error:
            return error


def _or_raise(result: np.ndarray | Exception) -> np.ndarray:
    if isinstance(result, Exception):
        raise result
    return result


def _finite(embeddings: np.ndarray) -> np.ndarray:
    if not np.isfinite(embeddings).all():
        raise FloatingPointError("the model's embeddings are not finite; its parameters are damaged")
    return embeddings


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _is_array(value: object) -> bool:
    """Whether ``value`` is an array of numbers of NumPy, JAX or PyTorch. PyTorch's dtypes have no ``kind``."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and getattr(dtype, "kind", None) not in ("O", "U", "S", "T")


def _as_numpy(array: object) -> np.ndarray:
    """Converts an array of NumPy or JAX, or a tensor of PyTorch on any device, without importing PyTorch."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
    try:
        return np.asarray(array)
    except TypeError:  # PyTorch's bfloat16, which NumPy has no dtype for
        return np.asarray(array.float())


def _texts(texts: str | Iterable[str]) -> list[str]:
    """Returns several texts, or one text, as a list."""
    if isinstance(texts, str | bytes):
        return [texts]
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        hint = "; from a processor's output, give input_ids" if isinstance(texts, Mapping) else ""
        raise TypeError(f"texts must be a string or an iterable of strings, not {type(texts).__name__}{hint}")
    return np.ravel(texts).tolist() if isinstance(texts, np.ndarray) else list(texts)


def _image_inputs(images: ImageInput | Iterable[ImageInput]) -> Iterable[ImageInput]:
    """Returns several images, or one image, as an iterable."""
    if isinstance(images, Image.Image | str | bytes | os.PathLike):
        return [images]
    if hasattr(images, "ndim"):
        if not _is_array(images):  # an array of paths
            return np.ravel(images).tolist()
        return images if images.ndim == 4 else [images]
    if isinstance(images, Mapping) or not isinstance(images, Iterable):
        hint = "; give the images themselves, not a processor's output" if isinstance(images, Mapping) else ""
        raise TypeError(f"images must be paths, Pillow images or arrays, not {type(images).__name__}{hint}")
    return images


def _open(image_input: ImageInput, max_pixels: int, max_aspect_ratio: float, as_stored: bool) -> Image.Image:
    limits = {"max_pixels": max_pixels, "max_aspect_ratio": max_aspect_ratio, "as_stored": as_stored}
    if isinstance(image_input, Image.Image):
        name = str(getattr(image_input, "filename", "") or "an image")
        try:
            return to_rgb(image_input, **limits)
        except ImageError as error:
            raise ImageError(f"{name}: {error}", error.reason) from None
        except Exception as error:  # damaged: Pillow's decoders raise errors of many types
            raise ImageError(f"{name}: {one_line(error)}") from None
    if isinstance(image_input, str | bytes | os.PathLike):
        path = os.fsdecode(image_input)
        try:
            return decode_image(_read_file(path), **limits)
        except ImageError as error:
            raise ImageError(f"{path}: {error}", error.reason) from None
    return to_rgb(Image.fromarray(_pixels(image_input)), **limits)


def _read_file(path: str) -> bytes:
    if "\0" in path:
        raise ValueError("bytes are read as a path; give an encoded image as Image.open(io.BytesIO(data))")
    if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would block until something writes to it
        raise ImageError(f"a {'folder' if os.path.isdir(path) else 'pipe or device'}, not an image file")
    with open(path, "rb") as file:
        return file.read()


def _pixels(image_input: object) -> np.ndarray:
    """Returns the array as uint8 ``[H, W, 3]``, ``[H, W]`` or ``[H, W, 4]``. Raises ValueError with the fix."""
    if not (hasattr(image_input, "shape") and hasattr(image_input, "dtype")):
        raise TypeError(f"an image must be a path, a Pillow image or an array, not {type(image_input).__name__}")
    shape, kind = list(image_input.shape), str(image_input.dtype).removeprefix("torch.")
    channels_first = len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4)
    fits = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    if kind == "uint8" and fits and all(shape):
        array = np.ascontiguousarray(_as_numpy(image_input))
        return array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    fixes = ["move the channels last" * channels_first]
    if "float" in kind:
        fixes.append("multiply pixels in [0, 1] by 255 and convert them to uint8")
        fixes.append("CLIP's mean and standard deviation are applied inside")
    elif kind == "uint16":
        fixes.append("divide it by 257 and convert it to uint8")
    elif kind != "uint8":
        fixes.append("convert pixels in [0, 255] to uint8")
    fix = "; ".join(filter(None, fixes))
    raise ValueError(f"an image must be an array uint8 [H, W, 3], not {kind} {shape}" + (f": {fix}" if fix else ""))


def load(
    path: str | os.PathLike,
    batch_size: int = 64,
    dtype: str = "float32",
    activation: str | None = None,
    preprocessing: str = "clip_jax",
) -> LoadedModel:
    """Loads the newest checkpoint of a run, or weights of OpenAI, open_clip or Hugging Face.

    Args:
      path: a run's folder, a file of weights, or a folder of weights and their config.
      batch_size: number of images or texts in a batch.
      dtype: of the computation, "float32" or "bfloat16".
      activation: "gelu" or "quick_gelu", for a file of weights that does not state it; None is "quick_gelu".
      preprocessing: "openai" gives the pixels of OpenAI's and open_clip's programs: an image is resized as stored, not
        turned by its EXIF orientation, and then converted to RGB by Pillow, so transparent pixels show their hidden
        colors and 16-bit images become white. "clip_jax" differs for such images only. Both apply the limits
        ``max_pixels`` and ``max_aspect_ratio`` of the model.

    Raises:
      FileNotFoundError: there is no model at ``path``.
      ValueError: ``dtype``, ``batch_size`` or ``preprocessing`` is not one of the choices.
      clip_jax.weights.WeightsError: the weights are damaged, unsafe, or of an architecture that is not supported.
      clip_jax.run_folder.CheckpointError: none of a run's checkpoints can be read.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be positive")
    if preprocessing not in PREPROCESSINGS:
        raise ValueError(f"preprocessing={preprocessing!r} must be one of {', '.join(PREPROCESSINGS)}")
    weights = read_weights(os.path.expanduser(os.fsdecode(path)), activation)
    if weights.note:
        logger.warning("%s", weights.note)
    return LoadedModel(weights, batch_size, dtype, preprocessing)
