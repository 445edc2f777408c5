"""The tokenizer's files of a Hugging Face folder, which must be those of CLIP's own tokenizer.

Another vocabulary, or other special tokens, would give other ids for the same text. The files are compared with the
vocabulary in :mod:`clip_jax.data.tokenizer`; none of them is needed.

Source: ``CLIPTokenizer`` and ``CLIPTokenizerFast`` of transformers 4 and 5.
"""

import pathlib
from collections.abc import Mapping

from clip_jax.data.tokenizer import END_OF_TEXT, START_OF_TEXT, VOCAB_SIZE, published_vocabulary
from clip_jax.weights.huggingface_fields import refuse_unknown
from clip_jax.weights.mapping import WeightsError
from clip_jax.weights.tensor_files import read_json

FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_MARKERS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
_SPECIAL = {"<|startoftext|>": START_OF_TEXT, "<|endoftext|>": END_OF_TEXT}
_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast")
# Padding and unknown tokens change nothing: what follows the end of a text has no effect, and each byte is known.
# fmt: off
_NO_EFFECT = frozenset(
    [
        "_commit_hash", "add_bos_token", "add_eos_token", "added_tokens_decoder", "additional_special_tokens",
        "auto_map", "backend", "clean_up_tokenization_spaces", "do_basic_tokenize", "errors", "extra_special_tokens",
        "is_local", "local_files_only", "max_length", "merges_file", "model_input_names", "name_or_path",
        "pad_to_multiple_of", "pad_token", "pad_token_type_id", "padding_side", "processor_class",
        "special_tokens_map_file", "stride", "tokenizer_file", "truncation_strategy", "unk_token", "use_fast",
        "vocab_file",
    ]
)
# fmt: on
_FIELDS = _NO_EFFECT | {
    "bos_token",
    "eos_token",
    "tokenizer_class",
    "model_max_length",
    "do_lower_case",
    "truncation_side",
}


def check_tokenizer(folder: pathlib.Path, vocab_size: int, context_length: int) -> None:
    """Compares the files that are there with CLIP's tokenizer, for a text tower of these sizes.

    A tower whose vocabulary is smaller than CLIP's takes tokens alone, so that no tokenizer matters to it.

    Raises:
      WeightsError: they would give other tokens; the file and what differs are named.
    """
    if vocab_size < VOCAB_SIZE:
        return
    symbols, merges = published_vocabulary()
    if (file := folder / "vocab.json").is_file():
        _check_vocabulary("vocab.json", read_json(file), symbols)
    if (file := folder / "merges.txt").is_file():
        _check_merges("merges.txt", file.read_text(encoding="utf-8").split("\n"), merges)
    if (file := folder / "tokenizer.json").is_file():
        _check_fast(read_json(file), symbols, merges)
    if (file := folder / "added_tokens.json").is_file():
        _check_added("added_tokens.json", read_json(file))
    if (file := folder / "special_tokens_map.json").is_file():
        _check_markers("special_tokens_map.json", read_json(file))
    if (file := folder / "tokenizer_config.json").is_file():
        _check_config(read_json(file), context_length)


def _check_vocabulary(where: str, found: Mapping, symbols: Mapping[str, int]) -> None:
    differing = [symbol for symbol in {**symbols, **found} if symbols.get(symbol) != found.get(symbol)]
    if differing:
        raise WeightsError(
            f"{where} is not the vocabulary of CLIP's tokenizer: {len(differing):,} symbols have other ids, such as "
            f"{differing[0]!r}"
        )


def _check_merges(where: str, found: list, merges: list[str]) -> None:
    pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in found]
    if pairs and str(pairs[0]).startswith("#version"):
        pairs = pairs[1:]
    pairs = [pair for pair in pairs if pair]
    if pairs != merges:
        raise WeightsError(f"{where} does not hold the {len(merges):,} merges of CLIP's tokenizer in their order")


def _check_fast(content: Mapping, symbols: Mapping[str, int], merges: list[str]) -> None:
    model = content.get("model") or {}
    if model.get("type", "BPE") != "BPE" or model.get("dropout"):
        raise WeightsError(f"tokenizer.json is a {model.get('type')} tokenizer with dropout={model.get('dropout')}")
    added = {token.get("content"): token.get("id") for token in content.get("added_tokens") or ()}
    _check_added("tokenizer.json", added)
    _check_vocabulary("tokenizer.json", {**(model.get("vocab") or {}), **added}, symbols)
    _check_merges("tokenizer.json", list(model.get("merges") or ()), merges)
    normalizer = content.get("normalizer") or {}
    steps = normalizer.get("normalizers") or [normalizer]
    if not any(step.get("type") == "Lowercase" for step in steps):
        raise WeightsError("tokenizer.json does not make texts lower case, as CLIP's tokenizer does")


def _check_added(where: str, added: Mapping) -> None:
    other = {token: number for token, number in added.items() if _SPECIAL.get(token) != number}
    if other:
        raise WeightsError(f"{where} adds tokens that CLIP's tokenizer does not have: {other}")


def _check_markers(where: str, content: Mapping) -> None:
    for name, wanted in _MARKERS.items():
        token = content.get(name, wanted)
        token = token.get("content") if isinstance(token, Mapping) else token
        if token != wanted:
            raise WeightsError(f"{where}: {name}={token!r} is not CLIP's {wanted!r}")


def _check_config(content: Mapping, context_length: int) -> None:
    name = "tokenizer_config.json"
    _check_markers(name, content)
    if content.get("tokenizer_class") not in (None, *_CLASSES):
        raise WeightsError(f"{name}: tokenizer_class={content['tokenizer_class']!r} is not CLIP's tokenizer")
    for field, wanted in (("do_lower_case", True), ("truncation_side", "right")):
        if content.get(field, wanted) != wanted:
            raise WeightsError(f"{name}: {field}={content[field]!r} is not how CLIP's tokenizer works")
    longest = content.get("model_max_length")
    if longest is not None and not (isinstance(longest, int | float) and longest >= context_length):
        raise WeightsError(f"{name}: model_max_length={longest!r} is not the model's {context_length} tokens")
    decoder = content.get("added_tokens_decoder") or {}
    _check_added(name, {token.get("content"): int(number) for number, token in decoder.items()})
    refuse_unknown(name, content, _FIELDS)
