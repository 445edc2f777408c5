"""The other files of a model's folder: a tokenizer that is not CLIP's is refused, what is not read is named."""

import dataclasses
import json

import numpy as np
import pytest
from goldens import MODELS

from clip_jax.data.tokenizer import VOCAB_SIZE, published_vocabulary
from clip_jax.weights import Weights, WeightsError, read_weights, write_weights
from clip_jax.weights.huggingface_tokenizer import check_tokenizer

SYMBOLS, MERGES = published_vocabulary()


def fast_tokenizer(**changes) -> dict:
    """A ``tokenizer.json`` as transformers writes it."""
    return {
        "added_tokens": [{"id": 49_406, "content": "<|startoftext|>"}, {"id": 49_407, "content": "<|endoftext|>"}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]},
        "post_processor": {"type": "RobertaProcessing"},
        "model": {"type": "BPE", "dropout": None, "vocab": SYMBOLS, "merges": [merge.split() for merge in MERGES]},
    } | changes


GOOD = {
    "vocab.json": json.dumps(SYMBOLS),
    "merges.txt": "\n".join(["#version: 0.2", *MERGES, ""]),
    "tokenizer.json": json.dumps(fast_tokenizer()),
    "added_tokens.json": json.dumps({"<|endoftext|>": 49_407}),
    "special_tokens_map.json": json.dumps({"bos_token": {"content": "<|startoftext|>"}, "pad_token": "!"}),
    "tokenizer_config.json": json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "!"}),
}


def test_clips_own_tokenizer_is_accepted(tmp_path):
    for file, content in GOOD.items():
        (tmp_path / file).write_text(content)
    [note] = check_tokenizer(tmp_path, VOCAB_SIZE, 77)
    assert "pad_token='!'" in note


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("vocab.json", json.dumps(SYMBOLS | {"cat</w>": 5}), "1 symbols have other ids, such as 'cat</w>'"),
        ("vocab.json", json.dumps(SYMBOLS | {"<new>": 49_408}), "<new>"),
        ("merges.txt", "\n".join(MERGES[1:]), "merges of CLIP's tokenizer"),
        ("merges.txt", "\n".join([MERGES[1], MERGES[0], *MERGES[2:]]), "in their order"),
        ("tokenizer.json", json.dumps(fast_tokenizer(normalizer={"type": "NFC"})), "lower case"),
        ("tokenizer.json", json.dumps(fast_tokenizer(added_tokens=[{"id": 49_408, "content": "<x>"}])), "<x>"),
        ("tokenizer.json", json.dumps(fast_tokenizer(model={"type": "Unigram"})), "Unigram"),
        ("tokenizer.json", json.dumps(fast_tokenizer(normalizer={"type": "StripAccents"})), "StripAccents"),
        ("tokenizer.json", json.dumps(fast_tokenizer(post_processor=None)), "post_processor of nothing"),
        ("tokenizer.json", json.dumps(fast_tokenizer(pre_tokenizer={"type": "Whitespace"})), "Whitespace"),
        ("tokenizer.json", json.dumps(fast_tokenizer(truncation={"max_length": 10})), "max_length"),
        ("tokenizer.json", json.dumps(fast_tokenizer(padding={"direction": "Left"})), "Left"),
        ("tokenizer.json", json.dumps(fast_tokenizer(added_tokens=["a"])), "added_tokens"),
        ("tokenizer_config.json", json.dumps({"unk_token": "photo"}), "unk_token='photo'"),
        ("tokenizer_config.json", json.dumps({"additional_special_tokens": ["photo"]}), "photo"),
        ("tokenizer_config.json", json.dumps({"padding_side": "left"}), "padding_side='left'"),
        ("tokenizer_config.json", json.dumps({"added_tokens_decoder": [1]}), "added_tokens_decoder"),
        ("tokenizer_config.json", json.dumps({"added_tokens_decoder": {"x": {}}}), "adds tokens"),
        ("tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": "mine.py"}}), "auto_map"),
        ("added_tokens.json", json.dumps({"<image>": 49_408}), "<image>"),
        ("special_tokens_map.json", json.dumps({"eos_token": "</s>"}), "eos_token='</s>'"),
        ("tokenizer_config.json", json.dumps({"tokenizer_class": "T5Tokenizer"}), "T5Tokenizer"),
        ("tokenizer_config.json", json.dumps({"do_lower_case": False}), "do_lower_case=False"),
        ("tokenizer_config.json", json.dumps({"truncation_side": "left"}), "truncation_side='left'"),
        ("tokenizer_config.json", json.dumps({"model_max_length": 64}), "model_max_length=64"),
        ("tokenizer_config.json", json.dumps({"strip_accents": True}), "strip_accents=True"),
        ("tokenizer_config.json", json.dumps({"added_tokens_decoder": {"3": {"content": "<y>"}}}), "<y>"),
    ],
)
def test_another_tokenizer_is_refused(tmp_path, file, content, words):
    (tmp_path / file).write_text(content)
    with pytest.raises(WeightsError) as caught:
        check_tokenizer(tmp_path, VOCAB_SIZE, 77)
    assert file in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)
    check_tokenizer(tmp_path, 1_000, 77)  # a small vocabulary takes tokens alone


def test_a_folder_with_another_tokenizer_is_refused(goldens, tmp_path):
    preset = MODELS["huggingface/gelu"].preset
    read = read_weights(goldens["huggingface/gelu"].path)
    larger = dataclasses.replace(preset, text=dataclasses.replace(preset.text, vocab_size=VOCAB_SIZE))
    text = read.variables["params"]["text"]
    rows = np.zeros((VOCAB_SIZE, preset.text.width), np.float32)
    variables = {"params": read.variables["params"] | {"text": text | {"token_embedding": rows}}}
    write_weights(Weights(larger, variables, "test"), tmp_path / "model", "huggingface")
    assert read_weights(tmp_path / "model").note == ""
    (tmp_path / "model" / "added_tokens.json").write_text('{"<image>": 49408}')
    with pytest.raises(WeightsError, match=r"added_tokens.json adds tokens .*<image>"):
        read_weights(tmp_path / "model")


@pytest.mark.parametrize(("name", "usual"), [("huggingface/gelu", "model"), ("open_clip_vit/gelu", "open_clip_model")])
def test_what_is_not_read_of_a_folder_is_named(goldens, tmp_path, name, usual):
    folder = tmp_path / "model"
    write_weights(read_weights(goldens[name].path), folder, name.partition("/")[0].removesuffix("_vit"))
    assert read_weights(folder).note == ""
    for file in ("model.fp16.safetensors", "adapter_config.json", "tf_model.h5", "README.md", "training_args.bin"):
        (folder / file).write_bytes(b"{}")
    assert read_weights(folder).note == (
        f"the model is that of {usual}.safetensors; not read: adapter_config.json, model.fp16.safetensors, tf_model.h5"
    )
