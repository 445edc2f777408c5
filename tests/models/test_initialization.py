"""Every parameter starts as OpenAI's: by ``CLIP.initialize_parameters`` where it speaks, else by PyTorch's defaults.

Vision blocks are left at PyTorch's defaults by the original; text blocks are normal, with the residual branches scaled
down by depth. Of a ResNet it speaks of the attention pooling's kernels and of the last norm of each residual block.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.clip import CLIP
from clip_jax.models.presets import CLIPPreset
from clip_jax.models.towers.resnet import ResNetPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.models.towers.vision_transformer import VisionTransformerPreset

V, T, LAYERS, PATCH, EMBED = 128, 96, 3, 8, 64  # widths of the towers, and sizes that no other number equals
R, STAGES = 20, (1, 4, 1, 3)  # a ResNet's width and blocks
TEXT_PRESET = TextTransformerPreset(width=T, num_layers=LAYERS, num_heads=2, context_length=40, vocab_size=1000)
PRESETS = {
    "vit": CLIPPreset(EMBED, VisionTransformerPreset(64, PATCH, width=V, num_layers=2, num_heads=2), TEXT_PRESET),
    "resnet": CLIPPreset(EMBED, ResNetPreset(64, width=R, stage_sizes=STAGES, num_heads=2), TEXT_PRESET),
}

VIT = {
    # nn.Conv2d without bias: uniform in ±1/sqrt(fan_in).
    "vision.patch_embedding.kernel": ("uniform", (3 * PATCH * PATCH) ** -0.5),
    "vision.class_embedding": ("normal", V**-0.5),
    "vision.positional_embedding": ("normal", V**-0.5),
    "vision.ln_pre.scale": ("constant", 1),
    "vision.ln_pre.bias": ("constant", 0),
    # nn.MultiheadAttention: Xavier uniform over the fused [3w, w]; nn.Linear's default for the output; biases 0.
    "vision.transformer.blocks.qkv.kernel": ("uniform", math.sqrt(6 / (4 * V))),
    "vision.transformer.blocks.qkv.bias": ("constant", 0),
    "vision.transformer.blocks.attention_output.kernel": ("uniform", V**-0.5),
    "vision.transformer.blocks.attention_output.bias": ("constant", 0),
    # nn.Linear: uniform in ±1/sqrt(fan_in), weight and bias.
    "vision.transformer.blocks.fc1.kernel": ("uniform", V**-0.5),
    "vision.transformer.blocks.fc1.bias": ("uniform", V**-0.5),
    "vision.transformer.blocks.fc2.kernel": ("uniform", (4 * V) ** -0.5),
    "vision.transformer.blocks.fc2.bias": ("uniform", (4 * V) ** -0.5),
    "vision.transformer.blocks.ln_1.scale": ("constant", 1),
    "vision.transformer.blocks.ln_1.bias": ("constant", 0),
    "vision.transformer.blocks.ln_2.scale": ("constant", 1),
    "vision.transformer.blocks.ln_2.bias": ("constant", 0),
    "vision.ln_post.scale": ("constant", 1),
    "vision.ln_post.bias": ("constant", 0),
    "vision.projection.kernel": ("normal", V**-0.5),
}


def conv(name, size, channels):
    """nn.Conv2d without bias: uniform in ±1/sqrt(fan_in)."""
    return {f"vision.{name}.kernel": ("uniform", (size * size * channels) ** -0.5)}


def norm(name, scale=1):
    return {f"vision.{name}.scale": ("constant", scale), f"vision.{name}.bias": ("constant", 0)}


def block(name, channels, width, downsample=False):
    """initialize_parameters: whatever ends in bn3.weight within a stage is 0, so that the block starts as nothing."""
    shortcut = conv(f"{name}.downsample_conv", 1, channels) | norm(f"{name}.downsample_bn") if downsample else {}
    convs = conv(f"{name}.conv1", 1, channels) | conv(f"{name}.conv2", 3, width) | conv(f"{name}.conv3", 1, width)
    return convs | norm(f"{name}.bn1") | norm(f"{name}.bn2") | norm(f"{name}.bn3", 0) | shortcut


RESNET = {
    **(conv("conv1", 3, 3) | conv("conv2", 3, R // 2) | conv("conv3", 3, R // 2)),
    **(norm("bn1") | norm("bn2") | norm("bn3")),
    **block("stage1_first", R, R, downsample=True),
    **block("stage2_first", 4 * R, 2 * R, downsample=True),
    **block("stage2_rest", 8 * R, 2 * R),
    **block("stage3_first", 8 * R, 4 * R, downsample=True),
    **block("stage4_first", 16 * R, 8 * R, downsample=True),
    **block("stage4_rest", 32 * R, 8 * R),
    "vision.attention_pool.positional_embedding": ("normal", (32 * R) ** -0.5),
    # initialize_parameters: normal kernels of one width; nn.Linear's default for the biases.
    "vision.attention_pool.query.kernel": ("normal", (32 * R) ** -0.5),
    "vision.attention_pool.query.bias": ("uniform", (32 * R) ** -0.5),
    "vision.attention_pool.key.kernel": ("normal", (32 * R) ** -0.5),
    "vision.attention_pool.key.bias": ("uniform", (32 * R) ** -0.5),
    "vision.attention_pool.value.kernel": ("normal", (32 * R) ** -0.5),
    "vision.attention_pool.value.bias": ("uniform", (32 * R) ** -0.5),
    "vision.attention_pool.output.kernel": ("normal", (32 * R) ** -0.5),
    "vision.attention_pool.output.bias": ("uniform", (32 * R) ** -0.5),
}
TEXT = {
    "logit_scale": ("constant", math.log(1 / 0.07)),
    "text.token_embedding": ("normal", 0.02),
    "text.positional_embedding": ("normal", 0.01),
    # initialize_parameters: attn_std, proj_std and fc_std; biases as nn.MultiheadAttention and nn.Linear leave them.
    "text.transformer.blocks.qkv.kernel": ("normal", T**-0.5),
    "text.transformer.blocks.qkv.bias": ("constant", 0),
    "text.transformer.blocks.attention_output.kernel": ("normal", T**-0.5 * (2 * LAYERS) ** -0.5),
    "text.transformer.blocks.attention_output.bias": ("constant", 0),
    "text.transformer.blocks.fc1.kernel": ("normal", (2 * T) ** -0.5),
    "text.transformer.blocks.fc1.bias": ("uniform", T**-0.5),
    "text.transformer.blocks.fc2.kernel": ("normal", T**-0.5 * (2 * LAYERS) ** -0.5),
    "text.transformer.blocks.fc2.bias": ("uniform", (4 * T) ** -0.5),
    "text.transformer.blocks.ln_1.scale": ("constant", 1),
    "text.transformer.blocks.ln_1.bias": ("constant", 0),
    "text.transformer.blocks.ln_2.scale": ("constant", 1),
    "text.transformer.blocks.ln_2.bias": ("constant", 0),
    "text.ln_final.scale": ("constant", 1),
    "text.ln_final.bias": ("constant", 0),
    "text.projection.kernel": ("normal", T**-0.5),
}


EXPECTED = {"vit": VIT | TEXT, "resnet": RESNET | TEXT}
PARAMETERS = [("vit", name) for name in VIT | TEXT] + [("resnet", name) for name in RESNET]


@pytest.fixture(scope="module")
def start():
    """A function from a family to its new variables, by name."""

    @functools.cache
    def make(family):
        model, images, tokens = CLIP(PRESETS[family]), jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 40), jnp.int32)
        variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), images, tokens))
        return {collection: by_name(tree) for collection, tree in variables.items()}

    return make


def by_name(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.float64(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("family", PRESETS)
def test_the_table_has_every_parameter(start, family):
    assert start(family)["params"].keys() == EXPECTED[family].keys()


@pytest.mark.parametrize(("family", "name"), PARAMETERS)
def test_a_parameter_starts_with_the_distribution_of_the_original(start, family, name):
    values, (kind, size) = start(family)["params"][name].ravel(), EXPECTED[family][name]
    count = values.size
    if kind == "constant":
        np.testing.assert_allclose(values, size, rtol=1e-6)
        return
    std, kurtosis = {"normal": (size, 3), "uniform": (size / math.sqrt(3), 1.8)}[kind]
    # Five standard errors of each.
    assert abs(values.mean()) < 5 * std / math.sqrt(count)
    assert abs(values.std() / std - 1) < 5 * math.sqrt((kurtosis - 1) / (4 * count))
    if kind == "uniform":
        assert size * (1 - 15 / count) < np.abs(values).max() <= size * (1 + 1e-6)
    else:
        assert np.abs(values).max() > 2 * size  # beyond where a uniform one of this deviation ends


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family, name in PARAMETERS
        if (".blocks." in name or "_rest." in name) and EXPECTED[family][name][0] != "constant"
    ],
)
def test_no_two_layers_start_alike(start, family, name):
    values = start(family)["params"][name]
    layers = values.reshape(len(values), -1)
    correlations = np.corrcoef(layers)[np.triu_indices(len(layers), 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(layers.shape[1])


def test_running_averages_start_at_mean_0_and_variance_1_of_no_batches(start):
    variables = start("resnet")
    norms = {name.removesuffix(".scale") for name in RESNET if name.endswith(".scale")}
    starts = {"mean": 0, "variance": 1, "num_batches": 0}
    assert variables["batch_stats"].keys() == {f"{norm}.{name}" for norm in norms for name in starts}
    for name, values in variables["batch_stats"].items():
        norm, _, kind = name.rpartition(".")
        scale = variables["params"][f"{norm}.scale"]
        assert values.shape == (scale.shape[:-1] if kind == "num_batches" else scale.shape)
        np.testing.assert_array_equal(values, starts[kind])


def test_only_a_resnet_has_running_averages(start):
    assert start("vit").keys() == {"params"}
