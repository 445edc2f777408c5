"""Every parameter starts as OpenAI's: by ``CLIP.initialize_parameters`` where it speaks, else by PyTorch's defaults.

Vision blocks are left at PyTorch's defaults by the original; text blocks are normal, with the residual branches scaled
down by depth.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.clip import CLIP
from clip_jax.models.presets import CLIPPreset, TextTransformerPreset, VisionTransformerPreset

V, T, LAYERS, PATCH, EMBED = 128, 96, 3, 8, 64  # widths of the towers, and sizes that no other number equals
PRESET = CLIPPreset(
    EMBED,
    VisionTransformerPreset(image_size=64, patch_size=PATCH, width=V, num_layers=2, num_heads=2),
    TextTransformerPreset(width=T, num_layers=LAYERS, num_heads=2, context_length=40, vocab_size=1000),
)

EXPECTED = {
    "logit_scale": ("constant", math.log(1 / 0.07)),
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


@pytest.fixture(scope="module")
def params():
    init = jax.jit(lambda key: CLIP(PRESET).init(key, jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 40), jnp.int32)))
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(init(jax.random.key(0))["params"]))
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.float64(leaf) for path, leaf in leaves}


def test_the_table_has_every_parameter(params):
    assert params.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_parameter_starts_with_the_distribution_of_the_original(params, name):
    values, (kind, size) = params[name].ravel(), EXPECTED[name]
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


@pytest.mark.parametrize("name", [name for name in EXPECTED if ".blocks." in name and EXPECTED[name][0] != "constant"])
def test_no_two_layers_start_alike(params, name):
    layers = params[name].reshape(len(params[name]), -1)
    correlations = np.corrcoef(layers)[np.triu_indices(len(layers), 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(layers.shape[1])
