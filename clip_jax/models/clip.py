"""CLIP: an image tower and a text tower into one space, and the temperature between them."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models.execution import Execution
from clip_jax.models.preprocessing import Preprocessing
from clip_jax.models.presets import CLIPPreset

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)
# Where SigLIP's temperature and bias start (arXiv 2303.15343, section 3.2).
SIGMOID_INITIAL_LOGIT_SCALE = math.log(10)
SIGMOID_INITIAL_LOGIT_BIAS = -10.0


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


class CLIP(nn.Module):
    """The two towers of ``preset``, computed as ``execution`` says, and the temperature; parameters are float32.

    With an ``initial_logit_bias`` there is a parameter ``logit_bias``, for the sigmoid loss.
    """

    preset: CLIPPreset
    execution: Execution = Execution()
    initial_logit_scale: float = INITIAL_LOGIT_SCALE
    initial_logit_bias: float | None = None

    def setup(self):
        self.vision = self.preset.vision.build(self.preset.embed_dim, self.execution)
        self.text = self.preset.text.build(self.preset.embed_dim, self.execution)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(self.initial_logit_scale), ())
        if self.initial_logit_bias is not None:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(self.initial_logit_bias), ())

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
        return self.encode_image(images, train, kept_patches), self.encode_text(tokens), self.logit_scale
