"""Turns text into the token ids of OpenAI's CLIP tokenizer, and back, without PyTorch or JAX.

Ids, cleaning and the split into words are those of github.com/openai/CLIP (``clip/simple_tokenizer.py``,
Radford et al. 2021, arXiv:2103.00020); the vocabulary is theirs, too (MIT license, next to the file).
"""

import functools
import gzip
import heapq
import html
from array import array
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import pairwise
from typing import NamedTuple

import ftfy
import numpy as np
import regex

VOCAB_SIZE = 49_408
START_OF_TEXT = 49_406
END_OF_TEXT = 49_407
SPECIAL_TOKENS = {"<|startoftext|>": START_OF_TEXT, "<|endoftext|>": END_OF_TEXT}

_FIRST_MERGE = 512  # the first ids are the 256 bytes, and the 256 bytes at the end of a word
_REMOVED = -1
# Ids follow this order of the 256 bytes: first those that are printable in Latin-1, then the others. The file writes
# the n-th of the others as the character 256 + n, so that no symbol contains a blank.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = [*_PRINTABLE, *sorted(set(range(256)) - set(_PRINTABLE))]
_BYTE_IDS = [_BYTES.index(byte) for byte in range(256)]
# IGNORECASE still matters after lower(): the long s is unchanged by lower() and matches the "s" in these patterns.
_PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
# Longer words (URLs, sentences in scripts without blanks) rarely occur again, and would only evict others. With both
# limits the cache of a process stays below 30 MB.
_CACHED_WORDS = 1 << 16
_CACHED_WORD_LENGTH = 32
_SHOWN_CHARACTERS = 60

# Two bytes hold any id, and joining byte strings is Python's fastest way to join arrays.
_START, _END = (array("H", [token]).tobytes() for token in (START_OF_TEXT, END_OF_TEXT))
_TOKEN_BYTES = len(_END)


def tokenize(texts: str | Sequence[str], context_length: int = 77, truncate: bool = False) -> np.ndarray:
    """Returns the token ids of one or more texts, as ``clip.tokenize`` does.

    Args:
        texts: one text, or a sequence of B texts.
        context_length: L, the length of a row; 77 for every model that OpenAI published.
        truncate: cut texts that are too long; the last token is then still end-of-text.

    Returns:
        int32 ``[B, L]``: start-of-text, the text, end-of-text, then zeros. B is 1 for a single text.

    Raises:
        TypeError: an entry is not a string.
        ValueError: a text needs more than L tokens and ``truncate`` is off, or L is below 2.

    Source: github.com/openai/CLIP, ``clip/clip.py``.
    """
    if context_length < 2:
        raise ValueError(f"context_length is {context_length}; start-of-text and end-of-text need at least 2")
    room = _TOKEN_BYTES * context_length
    rows = []
    for index, text in enumerate([texts] if isinstance(texts, str | bytes | None) else texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] is {type(text).__name__}, not str")
        row = _START + _encode(text) + _END
        if len(row) > room:
            if not truncate:
                raise ValueError(
                    f"texts[{index}], {_shortened(text)!r}, has {len(row) // _TOKEN_BYTES} tokens with "
                    f"start-of-text and end-of-text, more than context_length={context_length}: shorten it, or set "
                    "truncate=True"
                )
            row = row[: room - _TOKEN_BYTES] + _END
        rows.append(row.ljust(room, b"\0"))
    return np.frombuffer(b"".join(rows), np.uint16).reshape(-1, context_length).astype(np.int32)


def decode(tokens: Iterable[int]) -> str:
    """Returns the text of one row of token ids, in lower case, with single blanks between its pieces.

    A leading start-of-text is dropped. The first end-of-text and everything after it is ignored. Bytes that are not
    UTF-8, which truncation can leave, become U+FFFD.

    Args:
        tokens: integers, ``[L]``: a row of :func:`tokenize`, or any part of one.

    Returns:
        The text.

    Raises:
        ValueError: an id is outside ``[0, VOCAB_SIZE)``.
    """
    spelling = _vocabulary().spelling
    text = b""
    for position, token in enumerate(map(int, tokens)):
        if not 0 <= token < VOCAB_SIZE:
            raise ValueError(f"tokens[{position}] is {token}, outside the vocabulary of {VOCAB_SIZE}")
        if token == END_OF_TEXT:
            break
        if position or token != START_OF_TEXT:
            text += spelling[token]
    return text.decode(errors="replace").removesuffix(" ")


def _encode(text: str) -> bytes:
    # In printable ASCII, ftfy changes only entities that end in ";". It costs ten times as much as all the rest, so it
    # is skipped where it cannot change anything.
    if not (text.isascii() and text.isprintable() and ("&" not in text or ";" not in text)):
        text = ftfy.fix_text(text)
    # Lower case before the split: what a capital sigma becomes depends on the letters around it.
    words = html.unescape(html.unescape(text)).lower().split()
    return b"".join(
        [_encode_cached(word) if len(word) <= _CACHED_WORD_LENGTH else _encode_word(word) for word in words]
    )


def _encode_word(word: str) -> bytes:
    # No piece contains a blank, so a word's tokens do not depend on the words around it and can be cached.
    vocabulary = _vocabulary()
    tokens: list[int] = []
    for piece in [word] if word in vocabulary.whole else _PIECES.findall(word):
        tokens += [vocabulary.whole[piece]] if piece in vocabulary.whole else _merge(piece, vocabulary.merges)
    return array("H", tokens).tobytes()


_encode_cached = functools.lru_cache(_CACHED_WORDS)(_encode_word)


def _merge(piece: str, merges: dict[tuple[int, int], int]) -> list[int]:
    # A merge's id is also its rank. No merge creates a pair of lower rank than its own, since each symbol is made by
    # one merge before another merge uses it. So taking the least (rank, position) in turn gives the same as passes
    # over all positions, and the heap makes it n log n for a long text without blanks.
    symbols = [_BYTE_IDS[byte] for byte in piece.encode()]
    symbols[-1] += 256
    end = len(symbols)
    after = list(range(1, end + 1))
    before = list(range(-1, end - 1))
    heap = [(merges[pair], position) for position, pair in enumerate(pairwise(symbols)) if pair in merges]
    heapq.heapify(heap)
    while heap:
        merged, position = heapq.heappop(heap)
        removed = after[position]
        if removed == end or merges.get((symbols[position], symbols[removed])) != merged:
            continue
        symbols[position], symbols[removed] = merged, _REMOVED
        after[position] = after[removed]
        if after[position] < end:
            before[after[position]] = position
        for left, right in ((before[position], position), (position, after[position])):
            if left >= 0 and right < end and (rank := merges.get((symbols[left], symbols[right]))):
                heapq.heappush(heap, (rank, left))
    return [symbol for symbol in symbols if symbol != _REMOVED]


class _Vocabulary(NamedTuple):
    merges: dict[tuple[int, int], int]  # ids of two adjacent symbols: id of the merged symbol
    whole: dict[str, int]  # words that are one token: its id, which merging their bytes gives, too
    spelling: list[bytes]  # bytes of each id, with a blank where a word ends


@functools.cache
def published_vocabulary() -> tuple[dict[str, int], list[str]]:
    """Returns the vocabulary as the published file spells it, which other libraries' tokenizers take.

    Returns:
        The id of each symbol, and the merges in the order of their rank, each as ``"left right"``.
    """
    packed = (resources.files("clip_jax.data") / "vocabulary" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : VOCAB_SIZE - _FIRST_MERGE - len(SPECIAL_TOKENS) + 1]
    letters = [chr(byte) for byte in _PRINTABLE] + [chr(256 + n) for n in range(256 - len(_PRINTABLE))]
    symbols = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(line.replace(" ", "") for line in lines),
        *SPECIAL_TOKENS,
    ]
    return {symbol: token for token, symbol in enumerate(symbols)}, lines


@functools.cache
def _vocabulary() -> _Vocabulary:
    ids, lines = published_vocabulary()
    spelling = [bytes([byte]) for byte in _BYTES] + [bytes([byte]) + b" " for byte in _BYTES]
    merges = {}
    for token, line in enumerate(lines, _FIRST_MERGE):
        left, right = line.split()
        merges[ids[left], ids[right]] = token
        spelling.append(spelling[ids[left]] + spelling[ids[right]])
    # Symbols that are not UTF-8 become lone surrogates here, and so match no word.
    whole = {text[:-1].decode(errors="surrogateescape"): i for i, text in enumerate(spelling) if text.endswith(b" ")}
    return _Vocabulary(
        merges, whole | SPECIAL_TOKENS, spelling + [special.encode() + b" " for special in SPECIAL_TOKENS]
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
