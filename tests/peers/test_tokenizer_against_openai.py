"""Every id, live, against ``clip.tokenize``. Needs ``pip install -e ".[peers]"``; run with ``pytest tests/peers``."""

import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data.tokenizer import END_OF_TEXT, START_OF_TEXT, VOCAB_SIZE, decode, tokenize

clip = pytest.importorskip("clip")

REPOSITORY = pathlib.Path(__file__).parents[2]
EMOJI = REPOSITORY / "clip_jax/data/emoji"
GOLDEN = REPOSITORY / "tests/data/golden"
SCRAPS = [
    *["&", ";", "&amp;", "&amp;amp;", "&#39;", "&#x27;", "&lt", "&NTILDE;", "'s", "'LL", "'\u017f", "</w>", "<", ">"],
    *["<|startoftext|>", "<|endoftext|>", "<|", "|>", "Ã©", "â€™", "Ã ", "ﬁ", "’", "“", "İ", "ß", "Σ", "\u0301"],
    *[
        "\t",
        "\n",
        "\x0b",
        "\x1c",
        "\x1b[0m",
        "\x85",
        "\u00a0",
        "\u3000",
        "\ud800",
        "🐱",
        "中",
        "カ",
        "ｶ",
        "٣",
        "½",
        "cat",
    ],
]
WIDE = st.text(st.characters(), max_size=60)
LATIN = st.text(st.characters(max_codepoint=0x17F), max_size=60)
ASCII = st.text(st.characters(max_codepoint=0x7F), max_size=120)
MIXED = st.lists(st.one_of(st.sampled_from([*SCRAPS, " "]), st.text(max_size=3))).map("".join)


def assert_same(texts: list[str], context_length: int = 77) -> None:
    """Compares whole rows, and shows the first text that differs."""
    theirs = clip.tokenize(texts, context_length, truncate=True).numpy()
    ours = tokenize(texts, context_length, truncate=True)
    different = np.flatnonzero((theirs != ours).any(axis=1))
    assert not different.size, f"{len(different)} of {len(texts)} differ, first {texts[different[0]]!r}"


def test_every_id_is_spelt_as_theirs():
    peer = clip.clip._tokenizer
    assert len(peer.encoder) == VOCAB_SIZE
    assert peer.encoder["<|startoftext|>"] == START_OF_TEXT
    assert peer.encoder["<|endoftext|>"] == END_OF_TEXT
    for token in range(START_OF_TEXT):
        assert decode([token]) == peer.decode([token]).removesuffix(" ")


def test_all_emoji_names_are_the_same():
    assert_same([concept["name"] for concept in json.loads((EMOJI / "concepts.json").read_text(encoding="utf-8"))])


def test_all_emoji_captions_are_the_same():
    array_record_module = pytest.importorskip("array_record.python.array_record_module")
    msgpack = pytest.importorskip("msgpack")
    captions = set()
    for path in EMOJI.glob("*.array_record"):
        for record in array_record_module.ArrayRecordReader(str(path)).read_all():
            captions.update(msgpack.unpackb(record)["captions"])
    assert captions
    assert_same(sorted(captions))


def test_all_clip_art_captions_are_the_same():
    assert_same((GOLDEN / "openclipart_captions.txt").read_text(encoding="utf-8").splitlines())


def test_all_texts_of_the_golden_file_are_the_same_and_the_file_is_up_to_date():
    entries = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    for entry in entries:
        assert_same([entry["text"] * entry["times"]])
        row = clip.tokenize(entry["text"] * entry["times"], truncate=True)[0].tolist()
        assert row == entry["tokens"] + [0] * (77 - len(entry["tokens"]))


@pytest.mark.parametrize("scrap", SCRAPS)
def test_ten_thousand_characters_are_the_same_to_the_last_token(scrap):
    assert_same([(scrap * 10_000)[:10_000], ((scrap + " a1") * 10_000)[:10_000]], context_length=40_000)


def test_every_character_alone_and_inside_a_word_is_the_same():
    characters = [chr(code) for code in range(0x30000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 256):
        assert_same([" ".join(f"{one} A{one}s" for one in characters[start : start + 256])], context_length=8_000)


@given(st.lists(WIDE | LATIN | ASCII | MIXED, min_size=1, max_size=20))
@settings(max_examples=1000, deadline=None)
def test_any_text_is_the_same(texts):
    assert_same(texts, context_length=1000)


@given(WIDE | ASCII | MIXED, st.integers(2, 20))
@settings(max_examples=300, deadline=None)
def test_any_text_is_cut_the_same(text, context_length):
    assert_same([text], context_length)
