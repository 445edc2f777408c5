"""The image tower: a ResNet as CLIP has it (section 2.4 of the paper).

He et al.'s ResNet (arXiv 1512.03385) with three changes: a stem of three convolutions (ResNet-D, arXiv 1812.01187),
average pooling before every strided step instead of a stride (arXiv 1904.11486), and attention instead of global
average pooling at the end. Arrays are ``[B, H, W, C]``.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from clip_jax.models.layers import Initializer, Linear, matrix_product, shard_batch, torch_linear_init
from clip_jax.models.positions import resize_positions
from clip_jax.models.presets import RESNET_REDUCTION


def average_pool(x: jax.Array, size: int) -> jax.Array:
    """Means of ``size`` by ``size`` windows: ``[B, H, W, C]`` to ``[B, H / size, W / size, C]``."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // size, size, width // size, size, channels).mean(axis=(2, 4))


class Convolution(nn.Module):
    """A convolution without bias that keeps height and width, but for its ``stride``; kernel ``[K, K, in, out]``."""

    features: int
    kernel_size: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32
    batch_sharding: jax.sharding.Sharding | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, channels = self.kernel_size, x.shape[-1]
        init = nn.with_logical_partitioning(
            torch_linear_init(size * size * channels), ("height", "width", "channels", "embed")
        )
        kernel = self.param("kernel", init, (size, size, channels, self.features)).astype(self.dtype)
        if size == 1:
            y = matrix_product(x, kernel[0, 0])
        else:
            y = jax.lax.conv_general_dilated(
                x, kernel, (self.stride,) * 2, [(size // 2,) * 2] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return shard_batch(y, self.batch_sharding)


@functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("norm_statistics"))
def normalize_by_batch(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``[G, B, H, W, C]`` in any dtype to float32 of mean 0 and variance 1, but for scale and bias, in each group.

    Returns also the mean and the variance, ``[G, 1, 1, 1, C]``. The backward pass finds the statistics saved and
    computes the rest again: kept in float32, what is normalised would be most of a ResNet's memory.
    """
    wide = x.astype(jnp.float32)
    mean = checkpoint_name(wide.mean(axis=(1, 2, 3), keepdims=True), "norm_statistics")
    variance = checkpoint_name(jnp.square(wide - mean).mean(axis=(1, 2, 3), keepdims=True), "norm_statistics")
    return (wide - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias, mean, variance


class BatchNorm(nn.Module):
    """Normalises each channel of ``[B, H, W, C]`` over the other axes (arXiv 1502.03167), epsilon 1e-5.

    Computed in float32, returned in ``dtype``.

    In training the statistics are those of the batch: of all of it, on however many devices it lies, or with
    ``batch_norm="per_device"`` of each device's part by itself. Otherwise they are the running averages, which
    training moves by a tenth a step, and which the collection ``batch_stats`` holds. As in PyTorch, and unlike
    ``flax.linen.BatchNorm``, the running variance is the unbiased one; of several devices it is the mean.
    """

    train: bool
    batch_norm: str
    scale_init: Initializer = nn.initializers.ones
    dtype: jnp.dtype = jnp.float32
    batch_sharding: jax.sharding.NamedSharding | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.with_logical_partitioning(self.scale_init, ("embed",)), shape)
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)), shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_variance = self.variable("batch_stats", "variance", jnp.ones, shape)
        num_batches = self.variable("batch_stats", "num_batches", jnp.zeros, (), jnp.int32)
        if not self.train:
            factor = scale * jax.lax.rsqrt(running_variance.value + 1e-5)
            y = x.astype(jnp.float32) * factor + (bias - running_mean.value * factor)
            return shard_batch(y.astype(self.dtype), self.batch_sharding)

        per_device = self.batch_norm == "per_device" and self.batch_sharding is not None
        groups = self.batch_sharding.mesh.size if per_device else 1
        y = x.reshape(groups, -1, *x.shape[1:])  # [G, B / G, H, W, C]
        y = shard_batch(y, self.batch_sharding if per_device else None)
        y, mean, variance = normalize_by_batch(y, scale, bias)
        if not self.is_initializing():
            count = y.size // (groups * y.shape[-1])
            unbiased = variance * (count / max(count - 1, 1))
            running_mean.value += 0.1 * (mean.reshape(groups, -1).mean(axis=0) - running_mean.value)
            running_variance.value += 0.1 * (unbiased.reshape(groups, -1).mean(axis=0) - running_variance.value)
            num_batches.value = num_batches.value + 1  # not in place: a caller may hold the array
        return shard_batch(y.reshape(x.shape).astype(self.dtype), self.batch_sharding)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: ``[B, H, W, C]`` to ``[B, H / s, W / s, 4 * width]``.

    Where the block has a ``stride`` s, both ways average over s by s windows before their last convolution.
    """

    width: int
    stride: int
    train: bool
    batch_norm: str
    dtype: jnp.dtype = jnp.float32
    batch_sharding: jax.sharding.NamedSharding | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        kept = {"dtype": self.dtype, "batch_sharding": self.batch_sharding}
        convolution = functools.partial(Convolution, **kept)
        norm = functools.partial(BatchNorm, self.train, self.batch_norm, **kept)
        y = nn.relu(norm(name="bn1")(convolution(self.width, 1, name="conv1")(x)))
        y = nn.relu(norm(name="bn2")(convolution(self.width, 3, name="conv2")(y)))
        y = convolution(4 * self.width, 1, name="conv3")(average_pool(y, self.stride))
        y = norm(nn.initializers.zeros, name="bn3")(y)
        if x.shape != y.shape:
            x = convolution(4 * self.width, 1, name="downsample_conv")(average_pool(x, self.stride))
            x = norm(name="downsample_bn")(x)
        return nn.relu(x + y), None  # scan wants a carry and an output


class AttentionPool(nn.Module):
    """Multi-head attention of the mean over all places to each of them: ``[B, H, W, C]`` to ``[B, embed_dim]``.

    Section 2.4 of the paper; the mean stands among the keys and values as well. There are positions for ``side`` by
    ``side`` places; they are resized where H is another number.
    """

    side: int
    num_heads: int
    embed_dim: int
    dtype: jnp.dtype = jnp.float32
    batch_sharding: jax.sharding.NamedSharding | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, width = x.shape[0], x.shape[-1]
        normal = nn.initializers.normal(width**-0.5)
        linear = functools.partial(
            Linear,
            kernel_init=normal,
            bias_init=torch_linear_init(width),
            dtype=self.dtype,
            batch_sharding=self.batch_sharding,
        )
        side = x.shape[1]
        x = x.reshape(batch, -1, width)
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)  # [B, 1 + H * W, C]
        positions = self.param(
            "positional_embedding",
            nn.with_logical_partitioning(normal, ("position", "embed")),
            (1 + self.side**2, width),
        )
        x = shard_batch(x + resize_positions(positions, side).astype(self.dtype), self.batch_sharding)
        query = linear(width, ("embed", "heads"), name="query")(shard_batch(x[:, 0], self.batch_sharding))
        key = linear(width, ("embed", "heads"), name="key")(x)
        value = linear(width, ("embed", "heads"), name="value")(x)
        query, key, value = (y.reshape(*y.shape[:-1], self.num_heads, -1) for y in (query, key, value))
        scores = jnp.einsum("bhd,bkhd->bhk", query * query.shape[-1] ** -0.5, key).astype(jnp.float32)
        probabilities = nn.softmax(scores).astype(self.dtype)
        x = jnp.einsum("bhk,bkhd->bhd", probabilities, value).reshape(batch, width)
        return linear(self.embed_dim, ("heads", "output"), name="output")(x)


class ResNet(nn.Module):
    """Maps normalised images ``[B, H, W, 3]`` to features ``[B, embed_dim]`` in ``dtype``, not yet of unit length.

    The blocks of a stage after its first are alike and are scanned: their parameters and statistics carry a leading
    ``layers`` axis. ``train`` takes BatchNorm's statistics from the batch and updates the running averages.
    """

    image_size: int
    width: int
    stage_sizes: tuple[int, int, int, int]
    num_heads: int
    batch_norm: str
    embed_dim: int
    remat: str = "none"
    scan_unroll: int = 1
    dtype: jnp.dtype = jnp.float32
    batch_sharding: jax.sharding.NamedSharding | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        kept = {"dtype": self.dtype, "batch_sharding": self.batch_sharding}
        block = functools.partial(
            nn.remat(Bottleneck, prevent_cse=self.scan_unroll > 1) if self.remat != "none" else Bottleneck,
            train=train,
            batch_norm=self.batch_norm,
            **kept,
        )
        x = images.astype(self.dtype)
        for number, (features, stride) in enumerate(((self.width // 2, 2), (self.width // 2, 1), (self.width, 1)), 1):
            x = Convolution(features, 3, stride, **kept, name=f"conv{number}")(x)
            x = nn.relu(BatchNorm(train, self.batch_norm, **kept, name=f"bn{number}")(x))
        x = average_pool(x, 2)
        for number, num_blocks in enumerate(self.stage_sizes, 1):
            width = self.width * 2 ** (number - 1)
            x, _ = block(width, stride=1 if number == 1 else 2, name=f"stage{number}_first")(x)
            if num_blocks > 1:
                rest = nn.scan(
                    block.func,
                    variable_axes={"params": 0, "batch_stats": 0},
                    split_rngs={"params": True},
                    length=num_blocks - 1,
                    unroll=min(self.scan_unroll, num_blocks - 1),
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
                x, _ = rest(width, stride=1, **block.keywords, name=f"stage{number}_rest")(x)
        side = self.image_size // RESNET_REDUCTION
        return AttentionPool(side, self.num_heads, self.embed_dim, **kept, name="attention_pool")(x)
