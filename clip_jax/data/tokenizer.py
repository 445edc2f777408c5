"""OpenAI's CLIP byte-pair tokenizer, id for id, without PyTorch or JAX.

The ids, the cleaning and the split into words follow github.com/openai/CLIP (``clip/simple_tokenizer.py``,
Radford et al. 2021, arXiv:2103.00020); the vocabulary is theirs (MIT licence, beside the file).
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

_FIRST_MERGE = 512  # after the 256 bytes and the same 256 at the end of a word
_GONE = -1
# Ids follow this order of the 256 bytes: those that print in Latin-1 first, the others after them. The file
# writes a byte of the second kind as the character 256 + its place there, so that no symbol holds a blank.
_PRINTING = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = [*_PRINTING, *sorted(set(range(256)) - set(_PRINTING))]
_BYTE_IDS = [_BYTES.index(byte) for byte in range(256)]
# "IGNORECASE" still matters after lower(): the long s, which stays as it is, matches the "s" in these patterns.
_PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
# A longer word (a URL, a sentence in a script without blanks) hardly ever comes back: it would only push out
# others. With both limits the cache of one process stays below 30 MB, however long it runs.
_CACHED_WORDS = 1 << 16
_CACHED_WORD_LENGTH = 32
_SHOWN_CHARACTERS = 60

# Two bytes hold any id, and joining byte strings is the fastest way Python has to join arrays.
_START, _END = (array("H", [token]).tobytes() for token in (START_OF_TEXT, END_OF_TEXT))
_TOKEN_BYTES = len(_END)


def tokenize(texts: str | Sequence[str], context_length: int = 77, truncate: bool = False) -> np.ndarray:
    """Turns one text or several into rows of token ids, as ``clip.tokenize`` does.

    Args:
        texts: one text, or a sequence of B texts.
        context_length: L, the length of a row; 77 for every model OpenAI published.
        truncate: cut a text that is too long, and keep the end-of-text token as the last one.

    Returns:
        int32 ``[B, L]``: start-of-text, the text, end-of-text, then zeros. B is 1 for a single text.

    Raises:
        TypeError: an entry is not a string.
        ValueError: a text needs more than L tokens and ``truncate`` is off, or L cannot hold the two markers.

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
                    f"texts[{index}], {_shortened(text)!r}, is {len(row) // _TOKEN_BYTES} tokens long with its two "
                    f"markers, more than context_length={context_length}: shorten it, or cut it with truncate=True"
                )
            row = row[: room - _TOKEN_BYTES] + _END
        rows.append(row.ljust(room, b"\0"))
    return np.frombuffer(b"".join(rows), np.uint16).reshape(-1, context_length).astype(np.int32)


def decode(tokens: Iterable[int]) -> str:
    """Turns one row of token ids back into text: lower case, one blank after each piece but the last.

    Reads as the model does: a start-of-text that comes first is dropped, and nothing counts from the first
    end-of-text on. Bytes that are not UTF-8, as truncation can leave, become U+FFFD.

    Args:
        tokens: integers, ``[L]``: a row of :func:`tokenize`, or any part of one.

    Returns:
        The text.

    Raises:
        ValueError: an id is outside ``[0, VOCAB_SIZE)``.
    """
    spelling = _vocabulary().spelling
    text = b""
    for place, token in enumerate(map(int, tokens)):
        if not 0 <= token < VOCAB_SIZE:
            raise ValueError(f"tokens[{place}] is {token}, outside the vocabulary of {VOCAB_SIZE}")
        if token == END_OF_TEXT:
            break
        if place or token != START_OF_TEXT:
            text += spelling[token]
    return text.decode(errors="replace").removesuffix(" ")


def _encode(text: str) -> bytes:
    # Of printable ASCII, ftfy changes only entities that end in ";". It costs ten times all the rest, so it gets
    # no text that it is sure to leave as it is.
    if not (text.isascii() and text.isprintable() and ("&" not in text or ";" not in text)):
        text = ftfy.fix_text(text)
    # Lower case before the split: what a capital sigma becomes depends on the letters around it.
    words = html.unescape(html.unescape(text)).lower().split()
    return b"".join([_remembered(word) if len(word) <= _CACHED_WORD_LENGTH else _encode_word(word) for word in words])


def _encode_word(word: str) -> bytes:
    # No piece spans a blank, so a word's tokens do not depend on the words around it and can be remembered.
    vocabulary = _vocabulary()
    tokens: list[int] = []
    for piece in [word] if word in vocabulary.whole else _PIECES.findall(word):
        tokens += [vocabulary.whole[piece]] if piece in vocabulary.whole else _merge(piece, vocabulary.merges)
    return array("H", tokens).tobytes()


_remembered = functools.lru_cache(_CACHED_WORDS)(_encode_word)


def _merge(piece: str, merges: dict[tuple[int, int], int]) -> list[int]:
    # A merge's id is also its rank, and no merge makes a pair of lower rank than its own (each symbol is made by
    # one merge, before any merge uses it): taking the least (rank, place) in turn gives what whole passes give.
    # The heap keeps a long unbroken text at n log n.
    symbols = [_BYTE_IDS[byte] for byte in piece.encode()]
    symbols[-1] += 256
    end = len(symbols)
    after = list(range(1, end + 1))
    before = list(range(-1, end - 1))
    heap = [(merges[pair], place) for place, pair in enumerate(pairwise(symbols)) if pair in merges]
    heapq.heapify(heap)
    while heap:
        merged, place = heapq.heappop(heap)
        gone = after[place]
        if gone == end or merges.get((symbols[place], symbols[gone])) != merged:
            continue
        symbols[place], symbols[gone] = merged, _GONE
        after[place] = after[gone]
        if after[place] < end:
            before[after[place]] = place
        for left, right in ((before[place], place), (place, after[place])):
            if left >= 0 and right < end and (rank := merges.get((symbols[left], symbols[right]))):
                heapq.heappush(heap, (rank, left))
    return [symbol for symbol in symbols if symbol != _GONE]


class _Vocabulary(NamedTuple):
    merges: dict[tuple[int, int], int]  # the ids of two neighbours -> the id of the symbol they become
    whole: dict[str, int]  # every word that is one token; merging its bytes gives that token too
    spelling: list[bytes]  # the bytes of each id, with a blank where a word ends


@functools.cache
def published_vocabulary() -> tuple[dict[str, int], list[str]]:
    """The vocabulary as the published file spells it, which is how other libraries' tokenizers are set up.

    Returns:
        The id of each symbol, and the merges in the order of their rank, each as ``"left right"``.
    """
    packed = (resources.files("clip_jax.data") / "vocabulary" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : VOCAB_SIZE - _FIRST_MERGE - len(SPECIAL_TOKENS) + 1]
    letters = [chr(byte) for byte in _PRINTING] + [chr(256 + place) for place in range(256 - len(_PRINTING))]
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
    # Bytes that are not UTF-8 alone become lone surrogates here, and so match no word.
    whole = {text[:-1].decode(errors="surrogateescape"): i for i, text in enumerate(spelling) if text.endswith(b" ")}
    return _Vocabulary(
        merges, whole | SPECIAL_TOKENS, spelling + [special.encode() + b" " for special in SPECIAL_TOKENS]
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
