"""The registry: the section of the config that the losses make together, and the loss that it describes."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from clip_jax import losses
from clip_jax.losses.softmax import Softmax


def section(**changes):
    made = losses.default_section()
    made.update(changes)
    return made


def test_the_section_has_the_keys_of_all_losses_with_their_defaults():
    assert section().to_dict() == {"kind": "softmax", "form": "auto", "block_size": 0}
    assert losses.keys_that_may_change() == {"form", "block_size"}


def test_two_losses_cannot_have_one_key_with_different_defaults(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Other(Softmax):
        block_size: int = 64

    monkeypatch.setitem(losses.LOSSES, "other", Other)
    with pytest.raises(ValueError, match=r"config\.loss\.block_size: another loss than 'other'"):
        losses.default_section()


def test_all_mistakes_are_found_each_once_and_also_in_keys_of_other_losses():
    assert losses.problems(section()) == []
    found = losses.problems(section(kind="triplet", form="ring", block_size=-1))
    assert [line.partition(" ")[0] for line in found] == [
        "config.loss.kind='triplet'",
        "config.loss.form='ring'",
        "config.loss.block_size=-1",
    ]
    assert "one of softmax, sigmoid" in found[0] and "one of auto, gather, blockwise" in found[1]
    assert losses.problems(section(kind="sigmoid", form="ring")) == found[1:2]


@pytest.mark.parametrize(("capability", "block_size"), [(None, 1_024), ("9.0", 8_192)])
def test_what_the_config_leaves_open_follows_from_the_device_and_the_batch(capability, block_size):
    device = SimpleNamespace(platform="gpu" if capability else "tpu", compute_capability=capability)
    mesh = SimpleNamespace(devices=np.array([device] * 4), size=4)
    for count, form in ((8_192, "gather"), (16_384, "blockwise")):
        loss = losses.make_loss(section(), mesh, count, "bfloat16")
        assert (loss.form, loss.block_size) == (form, block_size)
    loss = losses.make_loss(section(form="gather", block_size=7), mesh, 16_384, "bfloat16")
    assert (loss.form, loss.block_size) == ("gather", 7)
    assert losses.make_loss(section(kind="sigmoid"), mesh, 8, "bfloat16").block_size == block_size


@pytest.mark.parametrize(
    ("kind", "learned", "started"),
    [
        ("softmax", {"logit_scale": 3.0}, {"logit_scale": 3.0}),
        ("softmax", {"logit_scale": 3.0, "logit_bias": -5.0}, {"logit_scale": math.log(1 / 0.07)}),
        ("sigmoid", {"logit_scale": 3.0, "logit_bias": -5.0}, {"logit_scale": 3.0, "logit_bias": -5.0}),
        ("sigmoid", {"logit_scale": 3.0}, {"logit_scale": math.log(10), "logit_bias": -10.0}),
    ],
)
def test_what_another_loss_learned_is_not_kept_and_the_towers_are(kind, learned, started):
    towers = {"vision": {"kernel": np.ones(2)}, "text": {"kernel": np.zeros(2)}}
    params = towers | {name: np.float32(value) for name, value in learned.items()}
    result = losses.starting_parameters(params, section(kind=kind))
    assert {name: result.pop(name) for name in towers} == towers
    assert result == pytest.approx(started)
