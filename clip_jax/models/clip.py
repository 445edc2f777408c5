"""CLIP: an image tower and a text tower into one space, and the temperature between them."""

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models.presets import CLIPPreset, Preprocessing, ResNetPreset
from clip_jax.models.resnet import ResNet
from clip_jax.models.text_transformer import TextTransformer
from clip_jax.models.vision_transformer import VisionTransformer


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
    """Both towers; parameters float32, computation in ``dtype``.

    ``remat``, of all scanned layers but the last, is "none", "full" to recompute each in the backward pass,
    "attention" to do so but for what attention gave, or "lite" to recompute only what is cheap (in a ResNet all three
    are "full"). ``scan_unroll`` is how many layers a scan step holds (1 compiles fastest; all of them let XLA work
    across layers, which pays for small models on CPU).
    Without ``scan_layers`` each layer of a transformer has parameters of its own (``unstack_layers``): a scan copies a
    layer's parameters out of the stack at each step, which costs more than it saves where nothing is trained.
    ``class_token_apart`` carries a Vision Transformer's class token beside its patches, which is the same function and
    what a TPU is faster with; ``fused_attention`` is the same function by cuDNN, for GPUs, in bfloat16
    (:mod:`clip_jax.models.backends` chooses both). ``batch_sharding`` says how the first axis of every activation is
    split over devices; None leaves it open. ``loss_parameters`` are the names and initial values of the float32 scalars
    that the loss learns (:mod:`clip_jax.losses`), by default those of the published models; the model only keeps them.
    """

    preset: CLIPPreset
    remat: str = "none"
    scan_layers: bool = True
    scan_unroll: int = 1
    class_token_apart: bool = False
    fused_attention: bool = False
    loss_parameters: tuple[tuple[str, float], ...] = (("logit_scale", math.log(1 / 0.07)),)
    dtype: jnp.dtype = jnp.float32
    batch_sharding: jax.sharding.Sharding | None = None

    def setup(self):
        shared = {
            "embed_dim": self.preset.embed_dim,
            "remat": self.remat,
            "scan_unroll": self.scan_unroll,
            "dtype": self.dtype,
            "batch_sharding": self.batch_sharding,
        }

        layers = {"scan_layers": self.scan_layers, "fused_attention": self.fused_attention}
        if isinstance(self.preset.vision, ResNetPreset):
            self.vision = ResNet(**dataclasses.asdict(self.preset.vision), **shared)
        else:
            apart = {"class_token_apart": self.class_token_apart}
            self.vision = VisionTransformer(**dataclasses.asdict(self.preset.vision), **shared, **layers, **apart)
        self.text = TextTransformer(**dataclasses.asdict(self.preset.text), **shared, **layers)
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
