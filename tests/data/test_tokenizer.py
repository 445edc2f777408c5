"""The tokenizer gives OpenAI's ids; its fast path, cache and batches do not change them."""

import html
import json
import pathlib
import re
import subprocess
import sys

import ftfy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data import tokenizer
from clip_jax.data.tokenizer import END_OF_TEXT, START_OF_TEXT, VOCAB_SIZE, decode, tokenize

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden/tokenizer.json").read_text(encoding="utf-8"))
SURROGATES = re.compile("[\ud800-\udfff]")
ENOUGH = 2000  # tokens; no text drawn below needs more
PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=200)
WIDE = st.text(max_size=100)
SCRAPS = ["&", ";", "amp", "&amp;", "&#", "39", "x27", "'s", "'", "<|", "|>", "<|endoftext|>", "é", "Ã©", "â€™", "\x0b"]
NEARLY_ASCII = st.lists(st.one_of(st.sampled_from([*SCRAPS, " ", "\n", "cat"]), PRINTABLE)).map("".join)


def text_tokens(text: str) -> list[int]:
    """Returns the ids between start-of-text and end-of-text."""
    row = tokenize(text, ENOUGH)[0].tolist()
    length = len(np.trim_zeros(row, "b"))
    return row[1 : length - 1]


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: entry["kind"])
def test_every_kind_of_text_gives_the_ids_that_openai_gives(entry):
    row = tokenize(entry["text"] * entry["times"], truncate=True)[0]
    assert row.tolist() == entry["tokens"] + [0] * (77 - len(entry["tokens"]))


def test_rows_are_int32_with_one_row_for_each_text():
    rows = tokenize(["a cat", "", "two dogs"])
    assert rows.shape == (3, 77)
    assert rows.dtype == np.int32
    assert rows.flags.writeable
    assert tokenize("a cat").shape == (1, 77)
    assert tokenize(("a cat",), context_length=8).shape == (1, 8)
    assert tokenize([]).shape == (0, 77)
    assert tokenize(np.array(["a cat", "a dog"])).shape == (2, 77)


def test_an_empty_text_is_the_two_markers_and_zeros():
    assert tokenize("", context_length=4).tolist() == [[START_OF_TEXT, END_OF_TEXT, 0, 0]]


def test_a_text_that_just_fits_is_not_an_error_and_one_token_more_is():
    assert tokenize("cat " * 75)[0, -1] == END_OF_TEXT
    with pytest.raises(ValueError, match="78 tokens"):
        tokenize("cat " * 76)


def test_the_error_for_a_long_text_has_text_length_and_fix():
    with pytest.raises(ValueError, match="truncate=True") as caught:
        tokenize(["a cat", "dog " * 300])
    message = str(caught.value)
    assert "texts[1]" in message
    assert "302 tokens" in message
    assert "context_length=77" in message
    assert "dog dog" in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, r"texts\[0\] is NoneType"),
        (b"a cat", r"texts\[0\] is bytes"),
        (["a cat", None], r"texts\[1\] is NoneType"),
        (["a cat", b"a dog"], r"texts\[1\] is bytes"),
        ([["a cat"]], r"texts\[0\] is list"),
        ([1.5], r"texts\[0\] is float"),
    ],
)
def test_an_entry_that_is_not_a_string_is_refused_by_index(texts, message):
    with pytest.raises(TypeError, match=message):
        tokenize(texts)


def test_a_context_too_short_for_the_markers_is_an_error():
    with pytest.raises(ValueError, match="context_length is 1"):
        tokenize("a cat", context_length=1)


def test_decoding_reads_from_the_first_token_to_the_first_end():
    assert decode(tokenize("A  Cat's caf\u00e9 &amp; 2 dogs!")[0]) == "a cat 's caf\u00e9 & 2 dogs !"
    assert decode([START_OF_TEXT, 320, END_OF_TEXT, 2368]) == "a"
    assert decode([]) == ""
    assert decode(np.array([320, 2368])) == "a cat"
    assert decode(tokenize("a <|startoftext|> b")[0]) == "a <|startoftext|> b"


def test_decoding_bytes_cut_in_the_middle_gives_the_replacement_character():
    assert "\ufffd" in decode(tokenize("\U0001fae8" * 9, context_length=4, truncate=True)[0])


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_decoding_an_id_outside_the_vocabulary_is_an_error(token):
    with pytest.raises(ValueError, match=rf"tokens\[1\] is {token}"):
        decode([320, token])


def test_the_vocabulary_has_an_id_for_every_merge_and_merging_reaches_every_whole_word():
    vocabulary = tokenizer._vocabulary()
    assert len(vocabulary.spelling) == VOCAB_SIZE
    assert sorted(vocabulary.merges.values()) == list(range(512, START_OF_TEXT))
    assert all(max(pair) < merged for pair, merged in vocabulary.merges.items())
    for word, token in vocabulary.whole.items():
        # The words that lower case, the split and UTF-8 let through; the special tokens are not merged.
        if token < START_OF_TEXT and word.lower().split() == [word] and not SURROGATES.search(word):
            assert tokenizer._merge(word, vocabulary.merges) == [token]
            assert tokenizer._PIECES.findall(word) == [word]


@given(PRINTABLE | NEARLY_ASCII | WIDE)
@settings(max_examples=500, deadline=None)
def test_skipping_ftfy_and_merges_changes_nothing(text):
    slow = []
    for piece in tokenizer._PIECES.findall(html.unescape(html.unescape(ftfy.fix_text(text))).lower()):
        special = {"<|startoftext|>": START_OF_TEXT, "<|endoftext|>": END_OF_TEXT}.get(piece)
        slow += [special] if special else tokenizer._merge(piece, tokenizer._vocabulary().merges)
    tokenizer._encode_cached.cache_clear()
    assert text_tokens(text) == slow
    assert text_tokens(text) == slow


@given(st.lists(PRINTABLE | WIDE, max_size=8))
@settings(deadline=None)
def test_a_batch_equals_its_texts_one_by_one(texts):
    rows = tokenize(texts, ENOUGH)
    assert rows.tolist() == [tokenize(text, ENOUGH)[0].tolist() for text in texts]


@given(PRINTABLE | WIDE, st.integers(2, 12))
@settings(deadline=None)
def test_truncation_keeps_the_beginning_and_ends_with_end_of_text(text, context_length):
    whole = [START_OF_TEXT, *text_tokens(text), END_OF_TEXT]
    row = tokenize(text, context_length, truncate=True)[0].tolist()
    if len(whole) > context_length:
        assert row == [*whole[: context_length - 1], END_OF_TEXT]
    else:
        assert row == whole + [0] * (context_length - len(whole))


@given(PRINTABLE.filter(lambda text: "&" not in text and "<|" not in text))
@settings(deadline=None)
def test_decoded_text_gives_the_same_ids_again_and_the_same_letters(text):
    row = tokenize(text, ENOUGH)[0]
    again = decode(row)
    assert again.replace(" ", "") == text.lower().replace(" ", "")
    assert tokenize(again, ENOUGH)[0].tolist() == row.tolist()


def test_the_word_cache_is_bounded_and_long_words_stay_out_of_it():
    tokenizer._encode_cached.cache_clear()
    tokenize("antelope " + "z" * 5000, truncate=True)
    information = tokenizer._encode_cached.cache_info()
    assert information.currsize == 1
    assert information.maxsize == 1 << 16


def test_a_fresh_process_in_another_locale_gives_the_same_ids_without_jax():
    texts = ["İI Iı ΑΣ café", "two dogs"]
    script = (
        "import sys; from clip_jax.data.tokenizer import tokenize\n"
        f"print(tokenize({texts!a}).tolist())\n"
        "assert not {'jax', 'torch'} & set(sys.modules)"
    )
    environment = {"LC_ALL": "tr_TR.UTF-8", "PYTHONPATH": str(pathlib.Path(__file__).parents[2]), "PYTHONHASHSEED": "7"}
    printed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, check=True, text=True
    )
    assert json.loads(printed.stdout) == tokenize(texts).tolist()
