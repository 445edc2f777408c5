"""A model as a small object: embed images and texts, classify pictures by names."""

import logging
import os
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from PIL import Image

from clip_jax.config import DTYPES
from clip_jax.data.images import ImageError, decode_image, evaluation_transform, to_rgb
from clip_jax.data.tokenizer import VOCAB_SIZE
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.zero_shot import classifier_weights
from clip_jax.models.backends import backend_of
from clip_jax.models.clip import CLIP
from clip_jax.models.transformer import unstack_layers
from clip_jax.training.sharding import batch_sharding, make_mesh
from clip_jax.training.step import place_variables
from clip_jax.weights import Weights, digest_of, preset_name, read_weights

Picture = Image.Image | np.ndarray | str | os.PathLike

logger = logging.getLogger("clip_jax")


class LoadedModel:
    """What :func:`load` returns.

    ``preset`` describes the model; ``logit_scale`` is what cosines are multiplied by; ``embedder`` takes uint8 images
    and tokens that are ready for the model.
    """

    def __init__(self, weights: Weights, batch_size: int, dtype: str):
        mesh = make_mesh(fsdp=1)
        model = CLIP(
            weights.preset,
            scan_layers=False,
            # The bias of a sigmoid loss is the same for all labels: it is kept, and changes no ranking.
            initial_logit_bias=0.0 if "logit_bias" in weights.variables["params"] else None,
            dtype=jnp.dtype(dtype),
            batch_sharding=batch_sharding(mesh),
            **backend_of(mesh.devices.flat[0]).model_options(weights.preset, dtype),
        )
        variables = place_variables(unstack_layers(weights.variables), model, mesh)
        self.preset = weights.preset
        self.logit_scale = float(np.exp(variables["params"]["logit_scale"]))
        self.embedder = Embedder(model, mesh, batch_size).with_variables(variables)
        self._variables = variables

    @property
    def name(self) -> str:
        """Of the architecture: a preset's, or "custom"."""
        return preset_name(self.preset)

    @property
    def digest(self) -> str:
        """Tells these weights from others."""
        return digest_of(self._variables)

    def encode_image(self, images: Picture | Sequence[Picture]) -> np.ndarray:
        """M pictures to float32 ``[M, D]`` of unit length; one alone is a list of one.

        A picture is a path, a PIL image, or an array uint8 ``[H, W, 3]`` (``[H, W]`` for grey, ``[H, W, 4]`` with
        alpha); an array ``[M, H, W, 3]`` is M of them. Each goes through CLIP's evaluation transform.

        Raises:
          ValueError: a picture cannot be decoded, or an array is none.
          FileNotFoundError: a path names no file.
        """
        if isinstance(images, Image.Image | str | os.PathLike) or getattr(images, "ndim", 4) < 4:
            images = [images]
        images = list(images)
        size = self.preset.vision.image_size
        if not images:
            return np.zeros((0, self.preset.embed_dim), np.float32)
        return self.embedder.encode_image(np.stack([evaluation_transform(_open(image), size) for image in images]))

    def encode_text(self, texts: str | Sequence[str] | np.ndarray) -> np.ndarray:
        """M texts, or tokens ``[M, L]`` as :func:`clip_jax.tokenize` gives them, to float32 ``[M, D]`` of unit length.

        Texts that are too long are cut; one alone is a list of one.

        Raises:
          TypeError: a text is not a string.
          ValueError: tokens are not integers of the vocabulary, or more than the context holds; or texts were given
            to a model whose vocabulary is smaller than the tokenizer's.
        """
        text = self.preset.text
        if getattr(texts, "dtype", np.dtype(object)).kind in "OUT":
            texts = [texts] if isinstance(texts, str) else list(texts)
            if text.vocab_size < VOCAB_SIZE:
                raise ValueError(f"the model's vocabulary of {text.vocab_size} is not the tokenizer's; give it tokens")
            return self.embedder.encode_text(texts) if texts else np.zeros((0, self.preset.embed_dim), np.float32)
        tokens = np.atleast_2d(texts)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not 0 < tokens.shape[1] <= text.context_length:
            raise ValueError(
                f"tokens must be integers [M, L] with L at most {text.context_length}, not {tokens.dtype} "
                f"{list(tokens.shape)}"
            )
        if tokens.size and (tokens.min() < 0 or tokens.max() >= text.vocab_size):
            raise ValueError(f"tokens must lie in [0, {text.vocab_size}), not in [{tokens.min()}, {tokens.max()}]")
        if not len(tokens):
            return np.zeros((0, self.preset.embed_dim), np.float32)
        return self.embedder.encode_tokens(tokens.astype(np.int32))

    def classify(
        self,
        images: Picture | Sequence[Picture],
        labels: str | Sequence[str],
        templates: str | Sequence[str] = ("{}",),
    ) -> np.ndarray:
        """Probabilities float32 ``[M, C]`` of C labels for M pictures, as in figure 1 of the paper.

        Several ``templates``, sentences with ``{}`` for the label, are averaged as embeddings (section 3.1.4).

        Raises:
          ValueError: there are no labels, or a template has no place for them; or as :meth:`encode_image`.
        """
        labels = [labels] if isinstance(labels, str) else list(labels)
        templates = [templates] if isinstance(templates, str) else list(templates)
        if not labels or not templates:
            raise ValueError("classify needs at least one label and one template")
        without = [template for template in templates if "{}" not in template]
        if without:
            raise ValueError(f"template {without[0]!r} has no {{}} for the label")
        weights = classifier_weights(self.encode_text, labels, templates)
        logits = self.logit_scale * self.encode_image(images) @ weights.T
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)


def _open(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        try:
            return to_rgb(picture)
        except OSError as error:  # opened, but cut short
            raise ValueError(f"{getattr(picture, 'filename', 'a picture')}: {error}") from None
    if isinstance(picture, str | os.PathLike):
        try:
            return decode_image(pathlib.Path(picture).read_bytes())
        except ImageError as error:
            raise ValueError(f"{os.fspath(picture)}: {error}") from None
    array = np.asarray(picture)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(
            f"a picture must be an array uint8 [H, W, 3], not {array.dtype} {list(array.shape)}; CLIP's mean and "
            "standard deviation are taken out inside"
        )
    return to_rgb(Image.fromarray(array))


def load(
    path: str | os.PathLike, batch_size: int = 64, dtype: str = "float32", activation: str | None = None
) -> LoadedModel:
    """Loads a run of ours (its newest checkpoint), or weights of OpenAI, open_clip or Hugging Face.

    Args:
      path: a run's folder, a file of weights, or a folder of weights and their config.
      batch_size: how many images or texts are embedded at once.
      dtype: of the computation, "float32" or "bfloat16".
      activation: "gelu" or "quick_gelu", for a file of weights that cannot tell; None takes OpenAI's quick_gelu.

    Raises:
      FileNotFoundError: there is no model.
      ValueError: ``dtype`` or ``batch_size`` is none.
      clip_jax.weights.WeightsError: it is damaged, unsafe, or not one of the models that are built here.
      clip_jax.training.checkpoint.CheckpointError: none of a run's checkpoints can be read.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be positive")
    weights = read_weights(path, activation)
    if weights.note:
        logger.warning("%s", weights.note)
    return LoadedModel(weights, batch_size, dtype)
