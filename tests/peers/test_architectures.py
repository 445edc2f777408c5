"""Each architecture at its full size against OpenAI's, open_clip's and transformers' classes with the same weights."""

import dataclasses

import jax
import numpy as np
import pytest

from clip_jax.models.clip import CLIP
from clip_jax.models.presets import PRESETS
from clip_jax.weights import huggingface, openai
from clip_jax.weights import open_clip as open_clip_files
from clip_jax.weights.mapping import preset_from_shapes, to_tensors, to_variables

pytest.importorskip("torch")
peer_models = pytest.importorskip("peer_models")

NINE = ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336"]
# Half a minute each, so nightly. Other tests compare the parameter counts and the configs of all nine.
LARGE = ("RN50x16", "RN50x64", "ViT-L/14", "ViT-L/14@336")
# Nightly where OpenAI's class has had them.
REPEATED = (*LARGE, "RN50x4", "ViT-B/16")
OPEN_CLIP_NAMES = {name: name.replace("/", "-").replace("@", "-") + "-quickgelu" for name in NINE}


def slow_are(slow, names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def gelu(preset):
    """The same architecture with the plain activation."""
    towers = {
        tower: dataclasses.replace(part, activation="gelu") if part.activation else part
        for tower, part in (("vision", preset.vision), ("text", preset.text))
    }
    return dataclasses.replace(preset, **towers)


def check(model, preset, table, size=2):
    """Embeddings, logits, and that every tensor comes back as it was."""
    tensors = peer_models.tensors_of(model)
    images, tokens = peer_models.random_batch(preset, size)
    expected = peer_models.embed(model, images, tokens)
    activation = preset.text.activation
    assert preset_from_shapes(tensors, table, activation) == preset
    variables = to_variables(tensors, table, preset)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == sum(
        parameter.numel() for parameter in model.parameters()
    )
    image_embeddings, text_embeddings, logit_scale = jax.jit(CLIP(preset).apply)(variables, images, tokens)
    for ours, theirs in ((image_embeddings, expected[0]), (text_embeddings, expected[1])):
        assert (1 - (np.float64(ours) * theirs).sum(axis=1) < 1e-5).all()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
        assert np.abs(theirs[0] - theirs[1]).max() > 1e-3  # two inputs that a wrong model could tell apart
    logits = np.exp(logit_scale) * image_embeddings @ text_embeddings.T
    np.testing.assert_allclose(logits, expected[2], rtol=0, atol=1e-4)

    back = to_tensors(variables, table, preset)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert back[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("name", slow_are(LARGE, NINE))
def test_openais_class(name):
    check(peer_models.openai_model(PRESETS[name]), PRESETS[name], openai.TABLE)


@pytest.mark.parametrize("name", slow_are(REPEATED, NINE))
def test_open_clips_class(name):
    model = peer_models.open_clip_model(PRESETS[name], OPEN_CLIP_NAMES[name])
    check(model, PRESETS[name], open_clip_files.TABLE)


@pytest.mark.parametrize("name", ["RN50", "ViT-B/32"])
def test_open_clips_class_with_the_plain_activation(name):
    model = peer_models.open_clip_model(PRESETS[name], OPEN_CLIP_NAMES[name].removesuffix("-quickgelu"))
    check(model, gelu(PRESETS[name]), open_clip_files.TABLE)


@pytest.mark.parametrize("name", slow_are(REPEATED, (name for name in NINE if name.startswith("ViT"))))
def test_transformers_class(name):
    check(peer_models.hugging_face_model(PRESETS[name]), PRESETS[name], huggingface.TABLE)


def test_transformers_class_with_the_plain_activation():
    preset = gelu(PRESETS["ViT-B/32"])
    check(peer_models.hugging_face_model(preset), preset, huggingface.TABLE)


@pytest.mark.parametrize("name", ["ViT-H-14", "ViT-g-14", "ViT-bigG-14"])
def test_open_clips_larger_models_have_their_own_heads_and_mlps(name):
    """By config and by shapes, at a depth of one layer: what differs from OpenAI's is in each layer."""
    import open_clip

    config = open_clip.get_model_config(name)
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 1
    preset = open_clip_files.read_config(config)
    model = peer_models.enliven(open_clip.CLIP(**config))
    check(model, preset, open_clip_files.TABLE)
    written = peer_models.enliven(open_clip.CLIP(**open_clip_files.config_of(preset)["model_cfg"]))
    assert {n: p.shape for n, p in written.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", NINE)
def test_open_clips_own_config_is_read_as_the_preset(name):
    import open_clip

    config = open_clip.get_model_config(OPEN_CLIP_NAMES[name])
    assert open_clip_files.read_config({"model_cfg": config}) == PRESETS[name]
    assert open_clip_files.read_config(open_clip_files.config_of(PRESETS[name])) == PRESETS[name]
