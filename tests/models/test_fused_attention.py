"""Attention as GPUs compute it: the same function as the written one, and in a GPU's program cuDNN's, never twice.

cuDNN itself needs a GPU. Here JAX's plain implementation stands in its place, behind the same call.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from clip_jax.models import attention as attention_module
from clip_jax.models.attention import AttentionMask, attention, fused_attention
from clip_jax.models.clip import CLIP
from clip_jax.models.execution import FUSED_HEAD_WIDTHS, REMAT_POLICIES, Execution
from clip_jax.models.presets import CLIPPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.models.towers.vision_transformer import VisionTransformerPreset
from clip_jax.models.transformer import pad_to_even_length, unstack_layers

END = 63  # the highest id of the tiny vocabulary
BATCH = 4


def preset(context_length: int) -> CLIPPreset:
    """With 5 positions of an image, an odd number, and heads of 8."""
    return CLIPPreset(
        16,
        VisionTransformerPreset(image_size=16, patch_size=8, width=32, num_layers=3, num_heads=4),
        TextTransformerPreset(width=16, num_layers=2, num_heads=2, context_length=context_length, vocab_size=END + 1),
    )


@pytest.fixture
def without_cudnn(monkeypatch):
    monkeypatch.setattr(attention_module, "FUSED_IMPLEMENTATION", "xla")


def inputs(context_length: int) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(0)
    tokens = random.integers(1, END, (BATCH, context_length))
    tokens[np.arange(BATCH), [1, 3, context_length - 1, 4]] = END
    return jnp.float32(random.normal(size=(BATCH, 16, 16, 3))), jnp.int32(tokens)


@functools.cache
def started(context_length: int) -> tuple[CLIP, dict]:
    """A model without fused attention, and its first parameters."""
    model = CLIP(preset(context_length))
    return model, nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), *inputs(context_length)))


def fused_like(model: CLIP, **changes) -> CLIP:
    return model.clone(execution=dataclasses.replace(model.execution, fused_attention=True, **changes))


def value_and_gradients(model: CLIP, params: dict, images: jax.Array, tokens: jax.Array):
    def objective(params):
        image_embeddings, text_embeddings, logit_scale = model.apply(params, images, tokens)
        logits = jnp.exp(logit_scale) * image_embeddings @ text_embeddings.T
        return -jnp.diag(jax.nn.log_softmax(logits)).mean()

    return jax.jit(jax.value_and_grad(objective))(params)


@functools.cache
def value_and_gradients_before(context_length: int):
    return value_and_gradients(*started(context_length), *inputs(context_length))


def assert_close(result: jax.Array, expected: jax.Array):
    # Float32 rounding follows an array's largest values, up to 77 in these gradients; processors round differently.
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("context_length", "remat"),
    [
        (8, "none"),
        (7, "lite"),
        *(pytest.param(7, remat, marks=pytest.mark.slow) for remat in REMAT_POLICIES if remat != "lite"),
    ],
)
def test_fused_attention_changes_neither_function_nor_gradients(without_cudnn, context_length, remat):
    model, params = started(context_length)
    fused = fused_like(model, remat=remat, scan_unroll=99 if remat == "lite" else 1)
    expected = value_and_gradients_before(context_length)
    result = value_and_gradients(fused, params, *inputs(context_length))
    jax.tree.map(assert_close, result, expected)
    assert all(np.abs(gradient).max() > 0 for gradient in jax.tree.leaves(expected[1]))


def test_fused_attention_is_the_same_function_in_layers_that_stand_by_themselves(without_cudnn):
    model, params = started(7)
    alone = fused_like(model, scan_layers=False)
    results = jax.jit(alone.apply)(unstack_layers(params), *inputs(7)), jax.jit(model.apply)(params, *inputs(7))
    for result, expected in zip(*results, strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


def test_parameters_start_alike_with_fused_attention(without_cudnn):
    model, params = started(7)
    fused = fused_like(model)
    result = nn.meta.unbox(jax.jit(fused.init)(jax.random.key(0), *inputs(7)))
    jax.tree.map(np.testing.assert_array_equal, result, params)


def test_what_cudnn_leaves_in_the_gradients_of_padding_reaches_no_parameter(without_cudnn, monkeypatch):
    """It may leave them as it found the memory, which may hold anything."""
    whole = jax.nn.dot_product_attention

    def leaving_padding(query, key, value, key_value_seq_lengths, query_seq_lengths, **settings):
        def attend(query, key, value, num_keys):
            return whole(query, key, value, key_value_seq_lengths=num_keys, **settings)  # all queries are there

        if key_value_seq_lengths is None or query.shape[1] == 1:
            return attend(query, key, value, key_value_seq_lengths)

        def backward(arguments, gradient):
            by_query, *others, _ = jax.vjp(attend, *arguments)[1](gradient)
            padding = (jnp.arange(key.shape[1]) >= arguments[3][:, None])[:, :, None, None]
            return by_query, *(jnp.where(padding, jnp.nan, x) for x in others), None

        leaving = jax.custom_vjp(attend)
        leaving.defvjp(lambda *arguments: (attend(*arguments), arguments), backward)
        return leaving(query, key, value, key_value_seq_lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", leaving_padding)
    model, params = started(7)
    fused = fused_like(model)
    result, expected = value_and_gradients(fused, params, *inputs(7)), value_and_gradients_before(7)
    jax.tree.map(assert_close, result, expected)


@pytest.mark.parametrize("length", [5, 6])
@pytest.mark.parametrize("causal", [False, True])
def test_the_position_that_makes_a_length_even_is_seen_by_no_other(without_cudnn, length, causal):
    ends = jnp.array([0, length - 1]) if causal else None
    random = np.random.default_rng(0)
    x = jnp.float32(random.normal(size=(2, length, 4)))
    (x,), mask, mask_to_read = pad_to_even_length(x, ends, Execution())
    assert x.shape == (2, 6, 4)
    heads = x.reshape(2, 6, 2, 2)
    read = heads[:, :1] if ends is None else heads[jnp.arange(2), ends][:, None]
    changed = heads.at[:, length:].add(1e3)
    for query, its_mask in ((heads[:, :length], mask), (read, mask_to_read)):
        before, after = (fused_attention(query, kv, kv, its_mask) for kv in (heads, changed))
        np.testing.assert_array_equal(before, after)


def test_one_query_sees_the_first_keys_of_its_sequence_alone():
    random = np.random.default_rng(0)
    query, key, value = (jnp.float32(random.normal(size=(2, length, 3, 4))) for length in (1, 6, 6))
    num_keys = jnp.array([1, 4])
    result = fused_attention(query, key, value, AttentionMask(num_keys=num_keys))
    visible = (jnp.arange(6) < num_keys[:, None])[:, None, :, None]  # [B, 1, K, 1]
    (expected,) = attention(*((x.transpose(0, 2, 3, 1),) for x in (query, key, value)), visible)
    np.testing.assert_allclose(result, expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("lite", 1), ("attention", 1), ("full", 2)])
def test_a_gpus_program_has_cudnns_attention_once_in_each_direction_unless_all_is_recomputed(monkeypatch, remat, times):
    """A primitive of JAX's is named in the policy; under another name attention would be recomputed unnoticed."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
    model = CLIP(preset(7), Execution(fused_attention=True, remat=remat, dtype=jnp.bfloat16))
    images, tokens = (jax.ShapeDtypeStruct(array.shape, array.dtype) for array in inputs(7))
    params = nn.meta.unbox(jax.eval_shape(CLIP(preset(7)).init, jax.random.key(0), images, tokens))

    def objective(params, images, tokens):
        image_embeddings, text_embeddings, _ = model.apply(params, images, tokens)
        return (image_embeddings * text_embeddings).sum()

    traced = jax.jit(jax.grad(objective)).trace(params, images, tokens)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Both towers scan, so each layer before the last is one place; the last has one query, and is not fused.
    assert program.count("@__cudnn$fmhaSoftmax(") == 2 * times
    assert program.count("@__cudnn$fmhaSoftmaxBackward(") == 2


def test_the_widths_of_heads_that_are_fused_are_those_that_jax_lets_pass(monkeypatch):
    def passes(width: int) -> bool:
        x = jax.ShapeDtypeStruct((2, 4, 2, width), jnp.bfloat16)
        try:
            jax.eval_shape(jax.grad(lambda x: fused_attention(x, x, x, AttentionMask()).astype(jnp.float32).sum()), x)
        except NotImplementedError:
            return False
        return True

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
    assert [width for width in range(1, 129) if passes(width)] == list(FUSED_HEAD_WIDTHS)
