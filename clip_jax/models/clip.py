"""The CLIP model: an image tower and a text tower with a shared embedding space, and the temperature."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models.execution import Execution
from clip_jax.models.preprocessing import Preprocessing
from clip_jax.models.presets import CLIPPreset


def normalize_images(images: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """Returns RGB uint8 ``[B, H, W, 3]`` as float32: scaled to [0, 1], minus the mean, divided by the deviation."""
    mean, std = jnp.array(preprocessing.mean, jnp.float32), jnp.array(preprocessing.std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std


def unit_length(x: jax.Array) -> jax.Array:
    """Divides each row by its Euclidean length, in float32."""
    x = x.astype(jnp.float32)
    # Not x / norm: the gradient of the norm of a zero row is NaN.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


def example_inputs(preset: CLIPPreset) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of one image and one text, for tracing ``init``."""
    size, length = preset.vision.image_size, preset.text.context_length
    return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)


def loss_parameters_of(params: dict) -> tuple[tuple[str, float], ...]:
    """Returns ``CLIP.loss_parameters`` for existing ``params``; the initial values are 0, as they are not used."""
    return tuple((name, 0.0) for name, leaf in params.items() if not isinstance(leaf, Mapping))


class CLIP(nn.Module):
    """The two towers of ``preset`` and the temperature. Parameters are float32.

    Attributes:
      preset: the description of the towers.
      execution: how they are computed.
      loss_parameters: names and initial values of the loss's float32 scalars (:mod:`clip_jax.losses`). The model stores
        them and does not use them. The default is that of the published models.
    """

    preset: CLIPPreset
    execution: Execution = Execution()
    loss_parameters: tuple[tuple[str, float], ...] = (("logit_scale", math.log(1 / 0.07)),)

    def setup(self):
        self.vision = self.preset.vision.build(self.preset.embed_dim, self.execution)
        self.text = self.preset.text.build(self.preset.embed_dim, self.execution)
        self.scalars = {
            name: self.param(name, nn.initializers.constant(initial), ()) for name, initial in self.loss_parameters
        }

    def encode_image(self, images: jax.Array, train: bool = False, kept_patches: jax.Array | None = None) -> jax.Array:
        """Returns image_embeddings float32 ``[B, embed_dim]`` of unit length, of normalized images ``[B, S, S, 3]``.

        Positions are resized if S is not the preset's ``image_size``. With ``kept_patches`` int32 ``[B, K]`` a Vision
        Transformer computes only these patches: patch dropout, for training.
        """
        dropout = {} if kept_patches is None else {"kept_patches": kept_patches}
        return unit_length(self.vision(images, train, **dropout))

    def encode_text(self, tokens: jax.Array) -> jax.Array:
        """Returns text_embeddings float32 ``[B, embed_dim]`` of unit length; ``tokens`` are int32 ``[B, L]``."""
        return unit_length(self.text(tokens))

    def __call__(
        self, images: jax.Array, tokens: jax.Array, train: bool = False, kept_patches: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns image_embeddings, text_embeddings and the stored logit_scale, which is its natural logarithm.

        A ResNet also has the collection ``batch_stats``; with ``train`` it must be mutable.
        """
        return self.encode_image(images, train, kept_patches), self.encode_text(tokens), self.scalars["logit_scale"]
