"""Overrides are read by the type of their key and name the nearest key; a key without a value is named."""

import pytest

from clip_jax.config import default_config, override, validate


@pytest.fixture
def config():
    config = default_config("ViT-B/32")
    config.data.source = "emoji:noto/train"
    return config


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("optimizer.wd", "optimizer.weight_decay"),
        ("gbs", "global_batch_size"),
        ("learning_rate", "optimizer.learning_rate"),
        ("model.width", "model.text.width"),
        ("model.vision.widht", "model.vision.width"),
        ("optimiser.beta1", "optimizer.beta1"),
    ],
)
def test_the_key_that_was_meant_is_named(config, key, meant):
    with pytest.raises(ValueError, match=rf"^--config\.{key}: there is no such key; did you mean --config\.{meant}\?$"):
        override(config, key, "1")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "5e8", 500_000_000),
        ("steps", "1_000", 1_000),
        ("steps", "2.0", 2),
        ("epochs", "3", 3.0),
        ("model.fused_attention", "False", False),
        ("model.preprocessing.mean", "0.5,0.5,0.5", (0.5, 0.5, 0.5)),
        ("data.source", "1", "1"),
    ],
)
def test_a_text_is_read_as_the_type_of_its_key(config, key, text, value):
    override(config, key, text)
    for name in key.split("."):
        config = config[name]
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "wanted"),
    [
        ("steps", "1.5", "a whole number"),
        ("steps", "inf", "a whole number"),
        ("steps", "", "a whole number"),
        ("model.fused_attention", "1", "true or false"),
        ("optimizer.beta1", "none", "a number"),
        ("model.preprocessing.mean", "a,b", "a number, ..."),
    ],
)
def test_another_text_is_refused_by_what_it_must_be(config, key, text, wanted):
    with pytest.raises(ValueError, match=rf"^--config\.{key}={text}: must be {wanted}$"):
        override(config, key, text)


KEYS = (
    *("seed", "steps", "optimizer", "optimizer.beta1", "loss", "loss.kind", "mesh.fsdp", "data.augmentation.hue"),
    *("model.embed_dim", "model.dtype", "model.vision", "model.text", "model.preprocessing.mean", "evaluation"),
)


@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize("key", KEYS)
def test_a_key_without_value_is_told_by_its_name(config, key, deleted):
    *sections, name = key.split(".")
    section = config
    for one in sections:
        section = section[one]
    with config.unlocked():
        if deleted:
            del section[name]
        else:
            section[name] = None
    with pytest.raises(ValueError, match=rf"^config\.{key}(\.\w+)* has no value; default_config"):
        validate(config)


def test_a_key_that_the_file_has_set_to_none_cannot_be_overridden(config):
    config.seed = None
    with pytest.raises(ValueError, match=r"^config\.seed has no value in the config file"):
        override(config, "seed", "3")
