"""Both towers: their sizes, what they may see, and that how they are computed does not change what they compute."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.config import model_preset
from clip_jax.models.clip import CLIP, IMAGE_MEAN, IMAGE_STD, normalize_images, unit_length
from clip_jax.models.presets import PRESETS, get_preset
from clip_jax.models.vision_transformer import split_into_patches

END = 63  # the highest id of the tiny vocabulary


@pytest.fixture
def tiny(tiny_config):
    """A tiny model, its parameters, four pictures and four texts."""
    model = CLIP(model_preset(tiny_config))
    random = np.random.default_rng(0)
    images = jnp.float32(random.normal(size=(4, 16, 16, 3)))
    tokens = random.integers(1, END, (4, 8))
    tokens[np.arange(4), [3, 7, 1, 5]] = END
    tokens = jnp.int32(tokens)
    params = nn.meta.unbox(model.init(jax.random.key(0), images, tokens))
    return model, params, images, tokens


@pytest.mark.parametrize(
    ("name", "count"),
    # As counted in the weights that OpenAI published.
    [
        ("ViT-B/32", 151_277_313),
        ("ViT-B/16", 149_620_737),
        ("ViT-L/14", 427_616_513),
        ("ViT-L/14@336", 427_944_193),
    ],
)
def test_a_published_size_has_exactly_as_many_parameters_as_the_published_weights(name, count):
    preset = get_preset(name)
    images = jnp.zeros((1, preset.vision.image_size, preset.vision.image_size, 3))
    tokens = jnp.zeros((1, 77), jnp.int32)
    params = jax.eval_shape(CLIP(preset).init, jax.random.key(0), images, tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_an_unknown_preset_is_answered_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"ViT-Z.*ViT-B/32.*ViT-tiny"):
        get_preset("ViT-Z")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_cut_into_whole_patches_and_heads(name):
    preset = PRESETS[name]
    assert preset.vision.image_size % preset.vision.patch_size == 0
    assert preset.vision.width == 64 * preset.vision.num_heads
    assert preset.text.width == 64 * preset.text.num_heads


def test_both_embeddings_are_float32_of_unit_length(tiny):
    model, params, images, tokens = tiny
    image_embeddings, text_embeddings, logit_scale = model.apply(params, images, tokens)
    for embeddings in (image_embeddings, text_embeddings):
        assert embeddings.dtype == jnp.float32
        assert embeddings.shape == (4, 16)
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-6)
        assert np.abs(embeddings[0] - embeddings[1]).max() > 1e-3  # not one vector for all
    assert np.exp(logit_scale) == pytest.approx(1 / 0.07, rel=1e-6)


def test_unit_length_of_a_row_of_zeros_is_zeros_with_a_finite_gradient():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(unit_length(x), [[0, 0], [0.6, 0.8]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: unit_length(x).sum())(x)).all()


def test_normalize_images_takes_out_the_mean_and_the_standard_deviation_of_each_channel():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)
    expected = (images / 255 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    result = normalize_images(jnp.asarray(images))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_the_patch_embedding_is_a_convolution_whose_stride_is_its_kernel():
    random = np.random.default_rng(0)
    images, kernel = random.normal(size=(2, 12, 8, 3)), random.normal(size=(4, 4, 3, 5))
    expected = np.zeros((2, 3, 2, 5))
    for row in range(3):
        for column in range(2):
            window = images[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            expected[:, row, column] = np.einsum("byxc,yxcw->bw", window, kernel)
    result = np.asarray(split_into_patches(jnp.float32(images), 4)) @ kernel.reshape(48, 5)
    np.testing.assert_allclose(result, expected.reshape(2, 6, 5), rtol=1e-4, atol=1e-4)


def test_the_image_tower_sees_every_patch_and_where_it_stands(tiny):
    model, params, images, _ = tiny
    encode = jax.jit(lambda images: model.apply(params, images, method="encode_image"))
    embeddings = encode(images)
    for row in (0, 8):
        for column in (0, 8):
            changed = images.at[:, row : row + 8, column : column + 8].add(1)
            assert np.abs(encode(changed) - embeddings).max() > 1e-3
    swapped = jnp.roll(images, 8, axis=1)  # the same patches in other places
    assert np.abs(encode(swapped) - embeddings).max() > 1e-3


def test_what_stands_behind_the_end_of_text_does_not_reach_the_text_feature(tiny):
    model, params, _, tokens = tiny
    encode = jax.jit(lambda tokens: model.apply(params, tokens, method="encode_text"))
    embeddings = encode(tokens)
    behind = np.arange(8) > np.asarray(tokens).argmax(axis=1)[:, None]
    for padding in (0, 17, END):  # a second end of text isn't the first
        changed = jnp.where(behind, padding, tokens)
        assert (np.asarray(changed) != np.asarray(tokens)).any()
        np.testing.assert_allclose(encode(changed), embeddings, rtol=0, atol=1e-6)


def test_a_shorter_context_without_the_padding_gives_the_same_text_feature(tiny):
    model, params, _, tokens = tiny
    for row in np.asarray(tokens):
        length = row.argmax() + 1
        whole, short = (model.apply(params, jnp.int32(t[None]), method="encode_text") for t in (row, row[:length]))
        np.testing.assert_allclose(short, whole, rtol=0, atol=1e-6)


def test_every_token_up_to_the_end_of_text_reaches_the_text_feature(tiny):
    model, params, _, tokens = tiny
    encode = jax.jit(lambda tokens: model.apply(params, tokens, method="encode_text"))
    embeddings = np.asarray(encode(tokens))
    ends = np.asarray(tokens).argmax(axis=1)
    for position in range(8):
        changed = tokens.at[:, position].set((tokens[:, position] + 1) % END)
        reached = np.abs(encode(changed) - embeddings).max(axis=1) > 1e-4
        assert reached[position < ends].all()
        assert not reached[position > ends].any()


def test_the_text_feature_is_read_at_the_first_highest_id_wherever_that_stands(tiny):
    model, params, _, _ = tiny
    encode = jax.jit(lambda tokens: model.apply(params, tokens, method="encode_text"))
    start = np.array([[5, 9, 7, 3, 2, 8, 4, 6]])
    for end in range(8):
        for highest in (END, 40):
            row = start.copy()
            row[0, end] = highest
            np.testing.assert_array_equal(row.argmax(axis=1), end)
            expected = model.apply(params, jnp.int32(row[:, : end + 1]), method="encode_text")
            np.testing.assert_allclose(encode(jnp.int32(row)), expected, rtol=0, atol=1e-6)


def test_in_bfloat16_every_product_is_bfloat16_and_parameters_and_embeddings_stay_float32(tiny):
    model, params, images, tokens = tiny
    half = dataclasses.replace(model, dtype=jnp.bfloat16)
    fresh = jax.eval_shape(half.init, jax.random.key(0), images, tokens)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}

    products = re.findall(
        r":(\w+)\[[\d,]*\](?:\{[^}]*\})? = dot_general", str(jax.make_jaxpr(half.apply)(params, images, tokens))
    )
    assert len(products) >= 2 * 8
    assert set(products) == {"bf16"}

    outputs = half.apply(params, images, tokens)
    assert {output.dtype for output in outputs} == {jnp.dtype("float32")}
    for rounded, exact in zip(outputs[:2], model.apply(params, images, tokens)[:2], strict=True):
        assert (np.sum(rounded * exact, axis=1) > 0.999).all()
        assert np.abs(rounded - exact).max() > 1e-5  # it did compute with less


def test_recomputing_layers_and_unrolling_their_scan_change_neither_function_nor_gradients(tiny):
    model, params, images, tokens = tiny

    def value_and_gradients(**changes):
        changed = dataclasses.replace(model, **changes)

        def objective(params):
            image_embeddings, text_embeddings, logit_scale = changed.apply(params, images, tokens)
            logits = jnp.exp(logit_scale) * image_embeddings @ text_embeddings.T
            return -jnp.diag(jax.nn.log_softmax(logits)).mean()

        return jax.jit(jax.value_and_grad(objective))(params)

    expected = value_and_gradients()
    assert all(np.abs(gradient).max() > 0 for gradient in jax.tree.leaves(expected[1]))
    # More layers in a scan step than there are is all of them; 2 doesn't divide the three.
    for changes in ({"remat": "full"}, {"scan_unroll": 99}, {"remat": "full", "scan_unroll": 2}):
        result = value_and_gradients(**changes)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), result, expected)


def test_remat_full_does_recompute_in_the_backward_pass(tiny):
    model, params, images, tokens = tiny

    def program(remat):
        changed = dataclasses.replace(model, remat=remat)
        return str(jax.make_jaxpr(jax.grad(lambda p: changed.apply(p, images, tokens)[0].sum()))(params))

    assert "remat" in program("full") or "checkpoint" in program("full")
    assert "remat" not in program("none")
    assert "checkpoint" not in program("none")
