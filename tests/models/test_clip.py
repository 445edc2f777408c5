"""Both towers: their sizes, what they may see, and that how they are computed does not change what they compute."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.clip import CLIP, normalize_images, unit_length
from clip_jax.models.preprocessing import IMAGE_MEAN, IMAGE_STD, Preprocessing
from clip_jax.models.presets import PRESETS, CLIPPreset, get_preset
from clip_jax.models.towers.resnet import RESNET_REDUCTION, ResNetPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.models.towers.vision_transformer import VisionTransformerPreset, split_into_patches
from clip_jax.models.transformer import unstack_layers

END = 63  # the highest id of the tiny vocabulary


PRESET = CLIPPreset(
    16,
    VisionTransformerPreset(image_size=16, patch_size=8, width=32, num_layers=2, num_heads=2),
    TextTransformerPreset(width=24, num_layers=2, num_heads=2, context_length=8, vocab_size=END + 1),
)


@pytest.fixture(scope="module")
def tiny():
    """A tiny model, its parameters, four images and four texts."""
    model = CLIP(PRESET)
    random = np.random.default_rng(0)
    images = jnp.float32(random.normal(size=(4, 16, 16, 3)))
    tokens = random.integers(1, END, (4, 8))
    tokens[np.arange(4), [3, 7, 1, 5]] = END
    tokens = jnp.int32(tokens)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), images, tokens))
    return model, params, images, tokens


def computed_with(model: CLIP, **changes) -> CLIP:
    return model.clone(execution=dataclasses.replace(model.execution, **changes))


@pytest.fixture(scope="module")
def encode_text(tiny):
    model, params, _, _ = tiny
    return jax.jit(lambda tokens: model.apply(params, tokens, method="encode_text"))


@pytest.mark.parametrize(
    ("name", "count"),
    # As counted in the weights that OpenAI published.
    [
        ("RN50", 102_007_137),
        ("RN101", 119_688_033),
        ("RN50x4", 178_300_601),
        ("RN50x16", 290_979_217),
        ("RN50x64", 623_258_305),
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
    variables = jax.eval_shape(CLIP(preset).init, jax.random.key(0), images, tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count


def test_an_unknown_preset_is_answered_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"ViT-Z.*ViT-B/32.*ViT-tiny"):
        get_preset("ViT-Z")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_cut_into_whole_patches_and_heads(name):
    preset = PRESETS[name]
    resnet = isinstance(preset.vision, ResNetPreset)
    assert preset.vision.image_size % (RESNET_REDUCTION if resnet else preset.vision.patch_size) == 0
    assert preset.vision.width * (RESNET_REDUCTION if resnet else 1) == 64 * preset.vision.num_heads
    assert preset.text.width == 64 * preset.text.num_heads


def test_both_embeddings_are_float32_of_unit_length(tiny):
    model, params, images, tokens = tiny
    image_embeddings, text_embeddings, logit_scale = jax.jit(model.apply)(params, images, tokens)
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
    result = normalize_images(jnp.asarray(images), Preprocessing())
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


def test_what_stands_behind_the_end_of_text_does_not_reach_the_text_feature(tiny, encode_text):
    tokens = tiny[-1]
    embeddings = encode_text(tokens)
    behind = np.arange(8) > np.asarray(tokens).argmax(axis=1)[:, None]
    for padding in (0, 17, END):  # a second end of text isn't the first
        changed = jnp.where(behind, padding, tokens)
        assert (np.asarray(changed) != np.asarray(tokens)).any()
        np.testing.assert_allclose(encode_text(changed), embeddings, rtol=0, atol=1e-6)


def test_a_shorter_context_without_the_padding_gives_the_same_text_feature(encode_text):
    short = jnp.int32([[5, 9, END], [7, END, 0], [END, 0, 0], [8, 8, END]])
    whole = jnp.pad(short, ((0, 0), (0, 5)))
    np.testing.assert_allclose(encode_text(short), encode_text(whole), rtol=0, atol=1e-6)


def test_every_token_up_to_the_end_of_text_reaches_the_text_feature(tiny, encode_text):
    tokens = tiny[-1]
    embeddings = np.asarray(encode_text(tokens))
    ends = np.asarray(tokens).argmax(axis=1)
    for position in range(8):
        changed = tokens.at[:, position].set((tokens[:, position] + 1) % END)
        reached = np.abs(encode_text(changed) - embeddings).max(axis=1) > 1e-4
        assert reached[position < ends].all()
        assert not reached[position > ends].any()


@pytest.mark.parametrize("highest", [END, 40])
def test_the_text_feature_is_read_at_the_highest_id_wherever_that_stands(encode_text, highest):
    texts = np.tile([5, 9, 7, 3, 2, 8, 4, 6], (8, 1))
    np.fill_diagonal(texts, highest)  # text i ends at position i
    for position in range(8):
        changed = texts.copy()
        changed[:, position] = np.where(texts[:, position] == highest, highest, 1)
        different = np.abs(encode_text(jnp.int32(changed)) - encode_text(jnp.int32(texts))).max(axis=1) > 1e-4
        np.testing.assert_array_equal(different, position < np.arange(8))


def test_in_bfloat16_every_product_is_bfloat16_and_parameters_and_embeddings_stay_float32(tiny):
    model, params, images, tokens = tiny
    half = computed_with(model, dtype=jnp.bfloat16)
    fresh = jax.eval_shape(half.init, jax.random.key(0), images, tokens)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}

    def factors(jaxpr):
        """The dtypes of what is multiplied in products of matrices."""
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield {factor.aval.dtype for factor in equation.invars}
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from factors(inner)

    products = list(factors(jax.make_jaxpr(half.apply)(params, images, tokens).jaxpr))
    assert len(products) >= 2 * 8
    assert all(dtypes == {jnp.dtype(jnp.bfloat16)} for dtypes in products)

    outputs = jax.jit(half.apply)(params, images, tokens)
    assert {output.dtype for output in outputs} == {jnp.dtype("float32")}
    for rounded, exact in zip(outputs[:2], jax.jit(model.apply)(params, images, tokens)[:2], strict=True):
        assert (np.sum(rounded * exact, axis=1) > 0.999).all()
        assert np.abs(rounded - exact).max() > 1e-5  # it did compute with less


@pytest.fixture(scope="module")
def value_and_gradients(tiny):
    """A function from changes of the execution to the loss and its gradients, each compiled once."""
    model, params, images, tokens = tiny

    @functools.cache
    def run(**changes):
        changed = computed_with(model, **changes)

        def objective(params):
            image_embeddings, text_embeddings, logit_scale = changed.apply(params, images, tokens)
            logits = jnp.exp(logit_scale) * image_embeddings @ text_embeddings.T
            return -jnp.diag(jax.nn.log_softmax(logits)).mean()

        return jax.jit(jax.value_and_grad(objective))(params)

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "full", "scan_unroll": 99},  # more layers in a scan step than there are: all of them
        {"remat": "lite"},
        {"remat": "attention"},
        {"class_token_apart": True},
        {"class_token_apart": True, "remat": "lite"},
        {"merge_leading_axes": False, "sums_by_product": True},
    ],
    ids=str,
)
def test_how_layers_are_computed_changes_neither_function_nor_gradients(value_and_gradients, changes):
    expected = value_and_gradients()
    assert all(np.abs(gradient).max() > 0 for gradient in jax.tree.leaves(expected[1]))
    result = value_and_gradients(**changes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), result, expected)


@pytest.mark.parametrize("choice", ["merge_leading_axes", "sums_by_product", "class_token_apart"])
def test_each_choice_reaches_the_layers(tiny, choice):
    model, params, images, tokens = tiny
    forms = {str(jax.make_jaxpr(computed_with(model, **{choice: on}).apply)(params, images, tokens)) for on in (0, 1)}
    assert len(forms) == 2


@pytest.mark.parametrize("apart", [False, True])
def test_layers_that_stand_by_themselves_are_the_same_function(tiny, apart):
    model, params, images, tokens = tiny
    alone = computed_with(model, scan_layers=False, class_token_apart=apart)
    unstacked = unstack_layers(params)
    expected = jax.tree.structure(nn.meta.unbox(jax.eval_shape(alone.init, jax.random.key(0), images, tokens)))
    assert jax.tree.structure(unstacked) == expected
    for result, scanned in zip(
        jax.jit(alone.apply)(unstacked, images, tokens), jax.jit(model.apply)(params, images, tokens), strict=True
    ):
        np.testing.assert_allclose(result, scanned, rtol=0, atol=1e-5)


def test_remat_lite_saves_a_layers_products_attention_its_results_and_full_nothing(tiny):
    model, params, images, tokens = tiny

    def saved(remat):
        changed = computed_with(model, remat=remat)
        residuals = jax.eval_shape(
            lambda p: jax.tree.leaves(jax.vjp(lambda p: changed.apply(p, images, tokens)[0].sum(), p)[1]), params
        )
        return sum(leaf.size for leaf in residuals)

    # Of 4 images of 5 positions of W = 32, in the one layer before the last, which is never recomputed.
    numbers = {remat: saved(remat) - saved("full") for remat in ("attention", "lite", "none")}
    # What attention gave and its output, the 2 heads' denominators, and two numbers for each of the 2 norms.
    assert numbers["attention"] == pytest.approx(4 * 5 * ((1 + 1) * 32 + 2 + 2 * 2), rel=0.05)
    assert numbers["lite"] - numbers["attention"] == pytest.approx(4 * 5 * (3 + 4) * 32, rel=0.05)
    assert numbers["none"] > numbers["lite"]


def test_remat_full_does_recompute_in_the_backward_pass(tiny):
    model, params, images, tokens = tiny

    def program(remat):
        changed = computed_with(model, remat=remat)
        return str(jax.make_jaxpr(jax.grad(lambda p: changed.apply(p, images, tokens)[0].sum()))(params))

    assert "remat" in program("full") or "checkpoint" in program("full")
    assert "remat" not in program("none")
    assert "checkpoint" not in program("none")
