"""A trained model as a small object: embed images and texts, classify pictures by names."""

import os
import pathlib
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
from etils import epath
from PIL import Image

from clip_jax.config import model_preset
from clip_jax.data.images import ImageError, decode_image, evaluation_transform, to_rgb
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.zero_shot import classifier_weights
from clip_jax.training.checkpoint import read_config, restore_params
from clip_jax.training.sharding import make_mesh
from clip_jax.training.step import abstract_params, make_model

Picture = Image.Image | np.ndarray | str | os.PathLike


class LoadedModel:
    """What :func:`load` returns. ``preset`` describes the model; ``logit_scale`` is what cosines are multiplied by."""

    def __init__(self, config: ml_collections.ConfigDict, params: dict, mesh: jax.sharding.Mesh, batch_size: int):
        self.preset = model_preset(config)
        self.logit_scale = float(np.exp(params["logit_scale"]))
        self._embedder = Embedder(make_model(config, mesh), mesh, batch_size).with_params(params)

    def encode_image(self, images: Sequence[Picture]) -> np.ndarray:
        """M pictures (paths, PIL images or uint8 ``[H, W, 3]`` arrays) to float32 ``[M, D]`` of unit length.

        Raises:
          ValueError: a picture cannot be decoded.
          FileNotFoundError: a path names no file.
        """
        size = self.preset.vision.image_size
        return self._embedder.encode_image(np.stack([evaluation_transform(_open(image), size) for image in images]))

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """M texts to float32 ``[M, D]`` of unit length; texts that are too long are cut."""
        return self._embedder.encode_text(texts)

    def classify(
        self, images: Sequence[Picture], labels: Sequence[str], templates: Sequence[str] = ("{}",)
    ) -> np.ndarray:
        """Probabilities float32 ``[M, C]`` of C labels for M pictures, as in figure 1 of the paper."""
        weights = classifier_weights(self.encode_text, labels, templates)
        logits = self.logit_scale * self.encode_image(images) @ weights.T
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)


def _open(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    if isinstance(picture, np.ndarray):
        return to_rgb(Image.fromarray(picture))
    try:
        return decode_image(pathlib.Path(picture).read_bytes())
    except ImageError as error:
        raise ValueError(f"{os.fspath(picture)}: {error}") from None


def load(run: str | os.PathLike, batch_size: int = 64) -> LoadedModel:
    """Loads the newest checkpoint of a run's folder.

    Raises:
      FileNotFoundError: the folder holds no run, or a run without a checkpoint.
      CheckpointError: none of its checkpoints can be read.
    """
    folder = epath.Path(run).resolve()
    saved = read_config(folder)
    if saved is None:
        raise FileNotFoundError(f"{os.fspath(run)} holds no run: there is no config.json in it")
    config = ml_collections.ConfigDict(saved)
    mesh = make_mesh(fsdp=1)
    params = restore_params(folder, abstract_params(make_model(config, mesh), mesh))
    return LoadedModel(config, params, mesh, batch_size)
