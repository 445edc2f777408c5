"""The flops of a model, compared with those of its traced gradient and with published numbers."""

import math

import jax
import jax.numpy as jnp
import pytest

from clip_jax.models.clip import CLIP
from clip_jax.models.execution import Execution
from clip_jax.models.presets import PRESETS, CLIPPreset
from clip_jax.models.towers.resnet import ResNetPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.planning.hlo import convolution_flops, parse_module
from clip_jax.planning.model_flops import loss_flops, tower_flops


def jaxpr_flops(jaxpr) -> int:
    """Of all products and convolutions, as jax writes them."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [jaxpr_flops(one) for one in jax.extend.core.jaxprs_in_params(equation.params)]
        name = equation.primitive.name
        total += sum(inner) * (equation.params["length"] if name == "scan" else 1)
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    return total


@pytest.mark.parametrize("name", ["ViT-tiny", "ViT-B/32", "ViT-L/14@336"])
def test_the_model_flops_of_a_vision_transformer_are_those_of_its_gradient(name):
    preset = PRESETS[name]
    size, length = preset.vision.image_size, preset.text.context_length
    images, tokens = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
    # Merged, queries, keys and values are always one product: the last layer would compute queries for all positions.
    model = CLIP(preset, Execution(merge_leading_axes=False))
    variables = jax.eval_shape(model.init, jax.random.key(0), images, tokens)
    jaxpr = jax.make_jaxpr(jax.grad(lambda variables, *batch: sum(x.sum() for x in model.apply(variables, *batch))))
    counted = jaxpr_flops(jaxpr(variables, images, tokens).jaxpr)
    # The gradient of attention computes the scores once more, which nothing forces it to.
    towers = ((preset.vision, (size // preset.vision.patch_size) ** 2 + 1), (preset.text, length))
    scores = sum(2 * tokens * tower.width * ((tower.num_layers - 1) * tokens + 1) for tower, tokens in towers)
    assert sum(tower_flops(preset).values()) == counted - scores


def test_the_model_flops_of_a_resnet_are_those_that_xla_counts():
    preset = CLIPPreset(24, ResNetPreset(64, 8, (2, 1, 1, 2), 4), TextTransformerPreset(8, 1, 1, 4, 16))
    model = CLIP(preset)
    images, tokens = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32), jax.ShapeDtypeStruct((1, 4), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images, tokens)
    text = (
        jax.jit(lambda v, x: model.apply(v, x, method="encode_image")).lower(variables, images).as_text(dialect="hlo")
    )
    module = parse_module(text)
    counted = sum(
        convolution_flops(computation, one)
        for computation in module.computations.values()
        for one in computation.values()
        if one.opcode in ("convolution", "dot")
    )
    first = 2 * 3 * 4 * sum(sum(0 <= 2 * o + k - 1 < 64 for k in range(3)) for o in range(32)) ** 2
    forward = (tower_flops(preset)["vision tower"] + first) / 3
    assert counted == pytest.approx(forward, rel=0.02)


def test_the_flops_of_the_forward_pass_are_those_that_open_clip_publishes():
    """Billions for a pair, in its docs/model_profile.csv, which counts all positions of the last layer as well."""
    for name, billions in (("ViT-B/32", 14.78), ("ViT-B/16", 41.09), ("ViT-L/14", 175.33)):
        preset = PRESETS[name]
        towers = ((preset.vision, (224 // preset.vision.patch_size) ** 2), (preset.text, 76))
        others = sum(
            2 * positions * tower.width * (10 * tower.width + 2 * (positions + 1)) for tower, positions in towers
        )
        forward = sum(tower_flops(preset).values()) / 3 + others
        assert forward / 1e9 == pytest.approx(billions, rel=0.02)
    assert loss_flops(32_768, 768) == 6 * 32_768**2 * 768
