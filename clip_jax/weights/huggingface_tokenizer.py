"""Checks that the tokenizer's files in a Hugging Face folder are those of CLIP's own tokenizer.

Another vocabulary, or other special tokens, would give other ids for the same text. The files are compared with the
vocabulary in :mod:`clip_jax.data.tokenizer`. Any of them may be missing.

Source: ``CLIPTokenizer`` and ``CLIPTokenizerFast`` of transformers 4 and 5.
"""

import pathlib
from collections.abc import Mapping

from clip_jax.data.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, published_vocabulary
from clip_jax.weights.huggingface_fields import mapping, refuse_unknown
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
# In tokenizer.json: the parts of each step of CLIP's tokenizer, and the settings of its byte pair encoding.
_STEPS = {
    "normalizer": {"NFC", "Replace", "Lowercase"},
    "pre_tokenizer": {"Split", "ByteLevel"},
    "post_processor": {"RobertaProcessing", "TemplateProcessing", "ByteLevel"},
}
_BPE = {
    "dropout": (None, 0),
    "end_of_word_suffix": ("</w>",),
    "continuing_subword_prefix": ("", None),
    "byte_fallback": (False, None),
    "ignore_merges": (False, None),
}
_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast")
# fmt: off
_NO_EFFECT = frozenset(
    [
        "_commit_hash", "add_bos_token", "add_eos_token", "added_tokens_decoder", "backend",
        "clean_up_tokenization_spaces", "do_basic_tokenize", "errors", "is_local", "local_files_only", "max_length",
        "merges_file", "model_input_names", "name_or_path",
        "pad_to_multiple_of", "pad_token_type_id", "processor_class", "special_tokens_map_file", "stride",
        "tokenizer_file", "truncation_strategy", "use_fast", "vocab_file",
    ]
)
# fmt: on
_SPECIAL_FIELDS = ("bos_token", "eos_token", "pad_token", "unk_token")
_MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")
_SIDES = {"do_lower_case": True, "truncation_side": "right", "padding_side": "right"}
_FIELDS = _NO_EFFECT | {*_SPECIAL_FIELDS, *_MORE_SPECIAL, *_SIDES, "tokenizer_class", "model_max_length"}


def check_tokenizer(folder: pathlib.Path, vocab_size: int, context_length: int) -> list[str]:
    """Compares the files that are present with CLIP's tokenizer, for a text tower of these sizes.

    A tower with a smaller vocabulary than CLIP's takes only tokens, so its tokenizer is not checked.

    Returns:
      Notes, one sentence each.

    Raises:
      WeightsError: the files would give other tokens; the message names the file and the difference.
    """
    if vocab_size < VOCAB_SIZE:
        return []
    symbols, merges = published_vocabulary()
    notes: list[str] = []
    if (file := folder / "vocab.json").is_file():
        _check_vocabulary("vocab.json", read_json(file), symbols)
    if (file := folder / "merges.txt").is_file():
        _check_merges("merges.txt", file.read_text(encoding="utf-8").split("\n"), merges)
    if (file := folder / "tokenizer.json").is_file():
        _check_fast(read_json(file), symbols, merges, context_length)
    if (file := folder / "added_tokens.json").is_file():
        _check_added("added_tokens.json", read_json(file))
    if (file := folder / "special_tokens_map.json").is_file():
        notes += _check_markers("special_tokens_map.json", read_json(file))
    if (file := folder / "tokenizer_config.json").is_file():
        notes += _check_config(read_json(file), context_length)
    return notes[:1]  # both files give the same note


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


def _check_fast(content: Mapping, symbols: Mapping[str, int], merges: list[str], context_length: int) -> None:
    model = mapping("tokenizer.json: model", content.get("model"))
    if model.get("type", "BPE") != "BPE":
        raise WeightsError(f"tokenizer.json is a {model.get('type')} tokenizer, not CLIP's byte pairs")
    wrong = [
        f"model.{name}={model[name]!r}" for name, good in _BPE.items() if name in model and model[name] not in good
    ]
    for name, good in _STEPS.items():
        kinds = _kinds(content.get(name))
        if not kinds or kinds - good:
            wrong.append(f"{name} of {', '.join(sorted(kinds)) or 'nothing'}")
    for name in ("truncation", "padding"):
        given = mapping(f"tokenizer.json: {name}", content.get(name))
        if str(given.get("direction", "right")).lower() != "right" or given.get("max_length", 77) < context_length:
            wrong.append(f"{name}={dict(given)}")
    if wrong:
        raise WeightsError(f"tokenizer.json is not CLIP's tokenizer: {'; '.join(wrong)}")
    added = {
        str(_content(token)): mapping("tokenizer.json: added_tokens", token).get("id")
        for token in content.get("added_tokens") or ()
    }
    _check_added("tokenizer.json", added)
    _check_vocabulary("tokenizer.json", {**(model.get("vocab") or {}), **added}, symbols)
    _check_merges("tokenizer.json", list(model.get("merges") or ()), merges)
    if "Lowercase" not in _kinds(content.get("normalizer")):
        raise WeightsError("tokenizer.json does not make texts lower case, as CLIP's tokenizer does")


def _kinds(step: object) -> set[str]:
    """The types of a step of the tokenizers library and of the steps in it."""
    step = mapping("tokenizer.json: a step", step)
    parts = step.get("normalizers") or step.get("pretokenizers") or ()
    return {str(step["type"]), *(kind for part in parts for kind in _kinds(part))} - {"Sequence"} if step else set()


def _check_added(where: str, added: Mapping) -> None:
    other = {token: number for token, number in added.items() if SPECIAL_TOKENS.get(token) != number}
    if other:
        raise WeightsError(f"{where} adds tokens that CLIP's tokenizer does not have: {other}")


def _check_markers(where: str, content: Mapping) -> list[str]:
    """Refuses other special tokens than the two markers: they are split off first, and would change a text's tokens."""
    notes = []
    for name in _SPECIAL_FIELDS:
        token = _content(content.get(name))
        if name == "pad_token" and token == "!":  # in several published folders
            notes.append(f"{where}: with pad_token='!' transformers gives '!' in a text another token than CLIP does")
        elif token is not None and token not in ([_MARKERS[name]] if name in _MARKERS else list(SPECIAL_TOKENS)):
            wanted = _MARKERS.get(name, "one of its two markers")
            raise WeightsError(f"{where}: {name}={token!r} is not CLIP's: {wanted}")
    for name in _MORE_SPECIAL:
        more = content.get(name) or []
        tokens = [_content(token) for token in (more.values() if isinstance(more, Mapping) else more)]
        if other := [token for token in tokens if token not in list(SPECIAL_TOKENS)]:
            raise WeightsError(f"{where}: {name}={other} are not CLIP's")
    return notes


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, Mapping) else token


def _check_config(content: Mapping, context_length: int) -> list[str]:
    name = "tokenizer_config.json"
    notes = _check_markers(name, content)
    if content.get("tokenizer_class") not in (None, *_CLASSES):
        raise WeightsError(f"{name}: tokenizer_class={content['tokenizer_class']!r} is not CLIP's tokenizer")
    for field, wanted in _SIDES.items():
        if content.get(field, wanted) != wanted:
            raise WeightsError(f"{name}: {field}={content[field]!r} is not how CLIP's tokenizer works")
    longest = content.get("model_max_length")
    if longest is not None and not (isinstance(longest, int | float) and longest >= context_length):
        raise WeightsError(f"{name}: model_max_length={longest!r} is not the model's {context_length} tokens")
    decoder = mapping(f"{name}: added_tokens_decoder", content.get("added_tokens_decoder"))
    _check_added(name, {str(_content(token)): _number(number) for number, token in decoder.items()})
    refuse_unknown(name, content, _FIELDS)
    return notes


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
