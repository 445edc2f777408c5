"""A benchmark whose peer is not installed names what is missing and measures ours."""

import importlib
import importlib.util
import sys

import pytest

from benchmarks.missing import has_peer

PEERS = {"torch", "torchvision", "open_clip", "open_clip_train", "clip", "clip_benchmark", "sklearn", "tensorflow"}
TINY_STEP = [
    "global_batch_size=8",
    "model.vision.width=16",
    "model.vision.num_layers=1",
    "model.vision.num_heads=1",
    "model.text.width=16",
    "model.text.num_layers=1",
    "model.text.num_heads=1",
]
# The arguments that make each as short as can be, the peers that are named, and a word of what is still measured.
BENCHMARKS = {
    "input": (["--rounds=1", "--images=1"], ["open_clip", "tf.data"], "images per CPU second"),
    "inference": (["--models=ViT-tiny", "--batch-sizes=1", "--rounds=1"], ["open_clip"], "texts  batch   1"),
    "linear_probe": (["--count=200", "--width=8", "--rounds=1"], ["scikit-learn"], "accuracy"),
    "loss": (["--batch-size=64", "--width=8", "--block-size=32", "--rounds=1"], ["open_clip"], "clip_jax   loss"),
    "retrieval": (["--images=20", "--peer-images=10", "--width=8"], ["CLIP_benchmark"], "20 images"),
    "tokenizer": (["--captions=10", "--rounds=1"], ["OpenAI's tokenizer"], "captions/s"),
    "train_step": (["--rounds=1", "--steps=1", *TINY_STEP], ["open_clip"], "images/s"),
}


SLOW = ("inference", "input", "train_step")  # ten seconds each


@pytest.fixture
def no_peers(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in PEERS else find(name, *rest))


@pytest.mark.usefixtures("no_peers")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in BENCHMARKS])
def test_the_rest_is_measured(name, monkeypatch, capsys):
    arguments, peers, measured = BENCHMARKS[name]
    benchmark = importlib.import_module(f"benchmarks.{name}")
    if name == "input":
        monkeypatch.setattr(benchmark, "SIZES", ((64, 64),))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    assert not benchmark.main()
    output, errors = capsys.readouterr()
    assert measured in output
    lines = [line for line in errors.splitlines() if "is not measured" in line]
    assert [line.partition(" is not measured")[0] for line in lines] == peers
    assert all("pip install" in line for line in lines)


@pytest.mark.usefixtures("no_peers")
def test_what_was_asked_for_alone_and_is_not_installed_is_a_mistake(monkeypatch, capsys):
    for name, only in [("input", "tf.data"), ("loss", "open_clip"), ("train_step", "open_clip eager")]:
        monkeypatch.setattr(sys, "argv", [name, f"--only={only}"])
        assert importlib.import_module(f"benchmarks.{name}").main() == 2
        assert "not installed" in capsys.readouterr().err


def test_an_installed_peer_is_not_named(capsys):
    assert has_peer("ours", "clip_jax numpy")
    assert capsys.readouterr().err == ""
