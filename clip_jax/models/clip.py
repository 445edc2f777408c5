"""CLIP: an image tower and a text tower into one space, and the temperature between them."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models.execution import Execution
from clip_jax.models.preprocessing import Preprocessing
from clip_jax.models.presets import CLIPPreset


def normalize_images(images: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """uint8 ``[B, H, W, 3]`` RGB to float32: from [0, 255] to [0, 1], minus the mean, over the standard deviation."""
    mean, std = jnp.array(preprocessing.mean, jnp.float32), jnp.array(preprocessing.std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std


def unit_length(x: jax.Array) -> jax.Array:
    """Divides each row by its Euclidean length, in float32."""
    x = x.astype(jnp.float32)
    # Not x / norm: the gradient of a norm is not a number where a row is zero.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


def example_inputs(preset: CLIPPreset) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of one image and one text, for tracing ``init``."""
    size, length = preset.vision.image_size, preset.text.context_length
    return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)


def loss_parameters_of(params: dict) -> tuple[tuple[str, float], ...]:
    """``CLIP.loss_parameters`` of a model with these ``params``, whose values make the initial values irrelevant."""
    return tuple((name, 0.0) for name, leaf in params.items() if not isinstance(leaf, Mapping))


class CLIP(nn.Module):
    """The two towers of ``preset``, computed as ``execution`` says, and the temperature; parameters are float32.

    ``loss_parameters`` are the names and initial values of the float32 scalars that the loss learns
    (:mod:`clip_jax.losses`), by default those of the published models; the model only keeps them.
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
        """Normalised images ``[B, S, S, 3]`` to image_embeddings float32 ``[B, embed_dim]`` of unit length.

        Positions are resized where S is not the preset's ``image_size``. ``kept_patches`` int32 ``[B, K]`` leaves out
        all other patches of a Vision Transformer: patch dropout, for training.
        """
        dropout = {} if kept_patches is None else {"kept_patches": kept_patches}
        return unit_length(self.vision(images, train, **dropout))

    def encode_text(self, tokens: jax.Array) -> jax.Array:
        """Tokens int32 ``[B, L]``, L at most context_length, to text_embeddings float32 of unit length."""
        return unit_length(self.text(tokens))

    def __call__(
        self, images: jax.Array, tokens: jax.Array, train: bool = False, kept_patches: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns image_embeddings, text_embeddings and logit_scale (its natural logarithm, as it is stored).

        A ResNet has the collection ``batch_stats`` beside its parameters; with ``train`` it must be mutable.
        """
        return self.encode_image(images, train, kept_patches), self.encode_text(tokens), self.scalars["logit_scale"]
