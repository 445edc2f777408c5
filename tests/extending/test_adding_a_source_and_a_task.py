"""The worked examples of docs/design.md, "How to add a source" and "How to add a task", are executed as they are."""

import importlib
import pickle
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from fenced_blocks import fenced_blocks
from fresh_clone import REPOSITORY

from clip_jax import prepare
from clip_jax.data.images import Augmentation
from clip_jax.data.pipeline import Batches, LoadPair, Transform
from clip_jax.data.sources import OPENERS, open_mixture, open_source
from clip_jax.data.tokenizer import END_OF_TEXT
from clip_jax.evaluation import registry
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.evaluations import Evaluations
from clip_jax.evaluation.task import Task
from clip_jax.evaluation.zero_shot import classifier_of
from clip_jax.training.state import make_model

pytestmark = pytest.mark.usefixtures("one_device")

DESIGN = REPOSITORY / "docs/design.md"


def example(word: str) -> str:
    """The block of docs/design.md that contains ``word``; it has fewer than 30 lines."""
    blocks = fenced_blocks("docs/design.md", DESIGN.read_text(encoding="utf-8"))
    (text,) = (block.text for block in blocks if word in block.text and block.language == "python")
    assert len(text.splitlines()) < 30
    return text


@pytest.fixture
def squares(tmp_path, monkeypatch):
    """``squares:`` is registered, from a module that worker processes could import."""
    (tmp_path / "squares.py").write_text(example("class SquaresSource"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "squares", raising=False)
    monkeypatch.setitem(OPENERS, "squares", importlib.import_module("squares").SquaresSource)


@pytest.mark.usefixtures("squares")
def test_the_source_of_the_documents_opens_and_survives_pickling():
    source = pickle.loads(pickle.dumps(open_source("squares:7")))
    assert len(source) == 7 and source[4].captions == ["a green square"] and source[4].label == "green"
    assert source.notes() == [] and source.fingerprint() != open_source("squares:8").fingerprint()
    with pytest.raises(ValueError, match="squares:many: write the number of images"):
        open_source("squares:many")


@pytest.mark.usefixtures("squares")
def test_the_source_of_the_documents_makes_batches_in_a_mixture():
    load_pair = LoadPair(open_mixture("squares:7 + digits:test", "3:1"), Transform(16, 16, Augmentation()))
    batches = Batches(load_pair, 8, seed=0)
    batch = next(batches)
    assert batch["image"].shape == (8, 16, 16, 3) and batch["tokens"].shape == (8, 16)


@pytest.mark.usefixtures("squares")
def test_the_source_of_the_documents_can_be_inspected(tmp_path, capsys):
    assert prepare.main(["inspect", "squares:7", f"--sheet={tmp_path / 'pairs.html'}"]) == 0
    assert "a red square" in capsys.readouterr().out


@pytest.mark.usefixtures("squares")
def test_the_task_of_the_documents_is_found_by_its_name_and_scored(monkeypatch, mesh_of, tiny_config):
    task = eval(example("square_colors"), {"Task": Task})
    monkeypatch.setattr(registry, "TASKS", (*registry.TASKS, task))
    evaluations = Evaluations(registry.find_tasks("square_colors"), 16, "")
    assert not evaluations.missing and not evaluations.broken
    tiny_config.model.text.update(vocab_size=END_OF_TEXT + 1, context_length=16)
    model = make_model(tiny_config, mesh_of((1, 1)))
    inputs = np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, 16), np.int32)
    variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), *inputs))
    embedder = Embedder(model, mesh_of((1, 1)), batch_size=100).set_variables(variables)
    (result,) = evaluations.score(embedder, classifier_of(embedder), "model", "tiny").tasks
    assert result.counts == {"images": 300, "classes": 3}
    np.testing.assert_array_equal(result.arrays["labels"][:4], [0, 1, 2, 0])
    assert result.metrics["top_1"] == (result.arrays["best"][:, 0] == result.arrays["labels"]).mean()
