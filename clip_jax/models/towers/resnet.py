"""The ResNet image tower of CLIP (section 2.4 of the CLIP paper).

He et al.'s ResNet (arXiv 1512.03385) with three changes: a stem of three convolutions (ResNet-D, arXiv 1812.01187),
average pooling before every strided step instead of a stride (arXiv 1904.11486), and attention instead of global
average pooling at the end. Arrays are ``[B, H, W, C]``.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from clip_jax.models.execution import Execution
from clip_jax.models.layers import Initializer, Linear, matrix_product, shard_batch, torch_linear_init
from clip_jax.models.positions import resize_positions
from clip_jax.models.towers.base import ImageTower, Shapes, side_of_grid
from clip_jax.models.towers.transformer_tower import HEAD_WIDTH
from clip_jax.settings import must_be_one_of

BATCH_NORMS = ("global", "per_device")
RESNET_REDUCTION = 32  # image side / side of the last stage's output; also channels of that output / width


@dataclasses.dataclass(frozen=True)
class ResNetPreset(ImageTower):
    """Describes a ResNet of CLIP.

    Attributes:
      image_size: in pixels.
      width: channels after the stem.
      stage_sizes: blocks in each of the four stages.
      num_heads: of the attention pooling.
      batch_norm: which images BatchNorm's statistics are computed over in training: "global", the whole batch, or
        "per_device", each device's share of it, as in open_clip.
    """

    name = "resnet"
    title = "ResNet"
    side_unit = RESNET_REDUCTION
    positions = ("attention_pool", "positional_embedding")
    training_fields = ("batch_norm",)
    # The attention pool ends with the projection, so a linear probe uses the tower's output.
    feature_layer = "vision"
    optimizer_defaults = {"beta2": 0.999, "epsilon": 1e-8}  # noqa: RUF012 (never changed; tables 19 and 20)

    image_size: int
    width: int
    stage_sizes: tuple[int, int, int, int]
    num_heads: int
    batch_norm: str = "global"

    @property
    def channels(self) -> int:
        """Channels of the last stage's output, and of the attention pool."""
        return RESNET_REDUCTION * self.width

    @property
    def head_width(self) -> float:
        return self.channels / self.num_heads

    def build(self, embed_dim: int, execution: Execution) -> nn.Module:
        return ResNet(self, embed_dim, execution)

    def numbers(self) -> tuple[dict[str, int | range], ...]:
        # A stage's first block is separate: only it has strides and a convolution as its shortcut.
        return tuple({"stage": stage, "block": range(1, size)} for stage, size in enumerate(self.stage_sizes, 1))

    def problems(self, prefix: str) -> list[str]:
        problems = []
        if self.image_size % RESNET_REDUCTION:
            problems.append(f"{prefix}.image_size={self.image_size} must be a multiple of {RESNET_REDUCTION}")
        if self.width % 2:
            problems.append(f"{prefix}.width={self.width} must be even: the stem starts with half of it")
        if self.channels % self.num_heads:
            problems.append(
                f"{prefix}.num_heads={self.num_heads} must divide the last stage's {self.channels} channels"
            )
        if len(self.stage_sizes) != 4 or min(self.stage_sizes) < 1:
            problems.append(f"{prefix}.stage_sizes={self.stage_sizes} must be four positive numbers")
        return problems + must_be_one_of(self, "batch_norm", BATCH_NORMS, prefix)

    def flops(self, embed_dim: int, patch_dropout: float) -> int:
        side, half, channels = self.image_size // 2, self.width // 2, self.width
        first = convolution_flops(self.image_size, 3, 3, half, stride=2)
        rest = convolution_flops(side, 3, half, half) + convolution_flops(side, 3, half, self.width)
        side //= 2
        for stage, num_blocks in enumerate(self.stage_sizes):
            width = self.width * 2**stage
            for block in range(num_blocks):
                stride = 2 if stage and not block else 1
                rest += convolution_flops(side, 1, channels, width) + convolution_flops(side, 3, width, width)
                side //= stride
                rest += convolution_flops(side, 1, width, 4 * width)
                if channels != 4 * width:
                    rest += convolution_flops(side, 1, channels, 4 * width)  # the shortcut's
                channels = 4 * width
        keys = side * side + 1
        pool = 2 * channels**2 * (1 + 2 * keys) + 2 * 2 * keys * channels + 2 * channels * embed_dim
        return 2 * first + 3 * (rest + pool)

    @classmethod
    def from_shapes(cls, shapes: Shapes, activation: str) -> "ResNetPreset":
        num_positions, channels = shapes.shape("attention_pool.positional_embedding")
        return cls(
            image_size=RESNET_REDUCTION * side_of_grid(num_positions),
            width=channels // RESNET_REDUCTION,
            stage_sizes=tuple(shapes.count("stage{stage}_rest.bn1.scale", "block", stage=n) for n in (1, 2, 3, 4)),
            num_heads=channels // HEAD_WIDTH,
        )


def convolution_flops(side: int, kernel: int, channels: int, features: int, stride: int = 1) -> int:
    """Returns the flops of a convolution, without kernel positions in the padding."""
    products = sum(  # along one axis: kernel positions inside the image, summed over all outputs
        sum(0 <= stride * output + offset - kernel // 2 < side for offset in range(kernel))
        for output in range(side // stride)
    )
    return 2 * products**2 * channels * features


def average_pool(x: jax.Array, size: int) -> jax.Array:
    """Returns means of ``size`` by ``size`` windows: ``[B, H, W, C]`` to ``[B, H / size, W / size, C]``."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // size, size, width // size, size, channels).mean(axis=(2, 4))


class Convolution(nn.Module):
    """A convolution without bias, kernel ``[K, K, in, out]``, that divides height and width by ``stride``."""

    features: int
    kernel_size: int
    stride: int = 1
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, channels = self.kernel_size, x.shape[-1]
        init = nn.with_logical_partitioning(
            torch_linear_init(size * size * channels), ("height", "width", "channels", "embed")
        )
        kernel = self.param("kernel", init, (size, size, channels, self.features)).astype(self.execution.dtype)
        if size == 1:
            y = matrix_product(x, kernel[0, 0], self.execution)
        else:
            y = jax.lax.conv_general_dilated(
                x, kernel, (self.stride,) * 2, [(size // 2,) * 2] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return shard_batch(y, self.execution)


@functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("norm_statistics"))
def normalize_by_batch(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalizes each group of ``[G, B, H, W, C]`` to mean 0 and variance 1, then applies scale and bias.

    Returns the result in float32, and the mean and the variance, ``[G, 1, 1, 1, C]``. Only the statistics are saved for
    the backward pass: the normalized float32 arrays would be most of a ResNet's memory.
    """
    wide = x.astype(jnp.float32)
    mean = checkpoint_name(wide.mean(axis=(1, 2, 3), keepdims=True), "norm_statistics")
    variance = checkpoint_name(jnp.square(wide - mean).mean(axis=(1, 2, 3), keepdims=True), "norm_statistics")
    return (wide - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias, mean, variance


class BatchNorm(nn.Module):
    """Normalizes each channel of ``[B, H, W, C]`` over the other axes, epsilon 1e-5 (arXiv 1502.03167).

    Computed in float32, returned in ``execution.dtype``.

    In training the statistics are those of the whole batch over all devices, or with ``batch_norm="per_device"`` those
    of each device's share. Otherwise they are the running averages in the collection ``batch_stats``, which each
    training step moves by a tenth. As in PyTorch, and unlike ``flax.linen.BatchNorm``, the running variance is
    unbiased. With per-device statistics the running averages use the mean over devices.
    """

    train: bool
    batch_norm: str
    scale_init: Initializer = nn.initializers.ones
    execution: Execution = Execution()

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
            return shard_batch(y.astype(self.execution.dtype), self.execution)

        sharding = self.execution.batch_sharding
        per_device = self.batch_norm == "per_device" and sharding is not None
        groups = sharding.mesh.size if per_device else 1
        y = x.reshape(groups, -1, *x.shape[1:])  # [G, B / G, H, W, C]
        y = shard_batch(y, self.execution) if per_device else y
        y, mean, variance = normalize_by_batch(y, scale, bias)
        if not self.is_initializing():
            count = y.size // (groups * y.shape[-1])
            unbiased = variance * (count / max(count - 1, 1))
            running_mean.value += 0.1 * (mean.reshape(groups, -1).mean(axis=0) - running_mean.value)
            running_variance.value += 0.1 * (unbiased.reshape(groups, -1).mean(axis=0) - running_variance.value)
            num_batches.value = num_batches.value + 1  # not in place: a caller may keep the array
        return shard_batch(y.reshape(x.shape).astype(self.execution.dtype), self.execution)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions plus a shortcut: ``[B, H, W, C]`` to ``[B, H / s, W / s, 4 * width]``.

    s is the ``stride``. Both branches average over s by s windows before their last convolution.
    """

    width: int
    stride: int
    train: bool
    batch_norm: str
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        convolution = functools.partial(Convolution, execution=self.execution)
        norm = functools.partial(BatchNorm, self.train, self.batch_norm, execution=self.execution)
        y = nn.relu(norm(name="bn1")(convolution(self.width, 1, name="conv1")(x)))
        y = nn.relu(norm(name="bn2")(convolution(self.width, 3, name="conv2")(y)))
        y = convolution(4 * self.width, 1, name="conv3")(average_pool(y, self.stride))
        y = norm(scale_init=nn.initializers.zeros, name="bn3")(y)
        if x.shape != y.shape:
            x = convolution(4 * self.width, 1, name="downsample_conv")(average_pool(x, self.stride))
            x = norm(name="downsample_bn")(x)
        return nn.relu(x + y), None  # scan requires a carry and an output


class AttentionPool(nn.Module):
    """Multi-head attention pooling: ``[B, H, W, C]`` to ``[B, embed_dim]``.

    The query is the mean over H and W. It is also one of the keys and values, with the H * W features. The positional
    embedding is for H = W = ``side``, and is resized for another H.

    Source: section 2.4 of the paper.
    """

    side: int
    num_heads: int
    embed_dim: int
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, width = x.shape[0], x.shape[-1]
        normal = nn.initializers.normal(width**-0.5)
        linear = functools.partial(
            Linear,
            kernel_init=normal,
            bias_init=torch_linear_init(width),
            execution=self.execution,
        )
        side = x.shape[1]
        x = x.reshape(batch, -1, width)
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)  # [B, 1 + H * W, C]
        positions = self.param(
            "positional_embedding",
            nn.with_logical_partitioning(normal, ("position", "embed")),
            (1 + self.side**2, width),
        )
        x = shard_batch(x + resize_positions(positions, side).astype(self.execution.dtype), self.execution)
        query = linear(width, ("embed", "heads"), name="query")(shard_batch(x[:, 0], self.execution))
        key = linear(width, ("embed", "heads"), name="key")(x)
        value = linear(width, ("embed", "heads"), name="value")(x)
        query, key, value = (y.reshape(*y.shape[:-1], self.num_heads, -1) for y in (query, key, value))
        scores = jnp.einsum("bhd,bkhd->bhk", query * query.shape[-1] ** -0.5, key).astype(jnp.float32)
        probabilities = nn.softmax(scores).astype(self.execution.dtype)
        x = jnp.einsum("bhk,bkhd->bhd", probabilities, value).reshape(batch, width)
        return linear(self.embed_dim, ("heads", "output"), name="output")(x)


class ResNet(nn.Module):
    """Maps normalized images ``[B, S, S, 3]`` to features ``[B, embed_dim]`` in ``execution.dtype``.

    The blocks of a stage after its first have equal shapes and are scanned: their parameters and statistics have a
    leading ``layers`` axis. With ``train``, BatchNorm uses the batch's statistics and updates the running averages.
    """

    preset: ResNetPreset
    embed_dim: int
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        preset, execution = self.preset, self.execution
        recomputed = nn.remat(Bottleneck, prevent_cse=execution.scan_unroll > 1)
        block = functools.partial(
            Bottleneck if execution.remat == "none" else recomputed,
            train=train,
            batch_norm=preset.batch_norm,
            execution=execution,
        )
        x, half = images.astype(execution.dtype), preset.width // 2
        for number, (features, stride) in enumerate(((half, 2), (half, 1), (preset.width, 1)), 1):
            x = Convolution(features, 3, stride, execution, name=f"conv{number}")(x)
            x = nn.relu(BatchNorm(train, preset.batch_norm, execution=execution, name=f"bn{number}")(x))
        x = average_pool(x, 2)
        for number, num_blocks in enumerate(preset.stage_sizes, 1):
            width = preset.width * 2 ** (number - 1)
            x, _ = block(width, stride=1 if number == 1 else 2, name=f"stage{number}_first")(x)
            if num_blocks > 1:
                rest = nn.scan(
                    block.func,
                    variable_axes={"params": 0, "batch_stats": 0},
                    split_rngs={"params": True},
                    length=num_blocks - 1,
                    unroll=min(execution.scan_unroll, num_blocks - 1),
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
                x, _ = rest(width, stride=1, **block.keywords, name=f"stage{number}_rest")(x)
        side = preset.grid_side(preset.image_size)
        return AttentionPool(side, preset.num_heads, self.embed_dim, execution, name="attention_pool")(x)
