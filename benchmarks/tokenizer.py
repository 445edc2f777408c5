"""Measures the tokenizer's speed on one core against OpenAI's SimpleTokenizer, on captions that never repeat.

    pip install -e ".[peers]"
    python -m benchmarks.tokenizer

Both take turns in this process on the same captions. clip_jax also builds the padded rows; OpenAI's returns only lists
of ids. No caption occurs twice. A caption has 4 to 20 words, from the included emoji names and the public-domain
openclipart captions in ``tests/data/golden``, drawn with Zipf's probabilities (proportional to 1 / rank by frequency).
One word in fifteen is a number below 10,000 instead, small ones more often. One caption in twenty ends with an accent,
an ampersand, an HTML entity or a typographic sign; the words may also contain some (one in forty of the included emoji
captions does). In both tokenizers, text outside plain ASCII goes through ftfy, which costs more than the rest of the
work, so the ratio falls as ``--unusual`` rises.

A cold round starts with empty caches in both. A warm round keeps the caches of earlier rounds, as in training; the
claim is about warm rounds. Each ratio is the median over rounds.
"""

import argparse
import importlib.util
import itertools
import json
import pathlib
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

from benchmarks.missing import has_peer
from clip_jax.data import tokenizer

REPOSITORY = pathlib.Path(__file__).parents[1]
EMOJI = REPOSITORY / "clip_jax/data/emoji/concepts.json"
CLIP_ART = REPOSITORY / "tests/data/golden/openclipart_captions.txt"
UNUSUAL = ["café", "& more", "“new”", "M&amp;M", "piñata", "– detail", "rock ’n’ roll", "25°", "日本", "©"]


def caption_stream(seed: int, unusual: float) -> Iterator[str]:
    """Yields an endless stream of distinct captions, as described in the module's docstring."""
    names = [concept["name"] for concept in json.loads(EMOJI.read_text(encoding="utf-8"))]
    counts = Counter(" ".join([*names, CLIP_ART.read_text(encoding="utf-8")]).split())
    words = [word for word, _ in counts.most_common()]
    cumulative = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))
    chance, seen = random.Random(seed), set()
    while True:
        drawn = chance.choices(words, cum_weights=cumulative, k=chance.randint(4, 20))
        drawn = [str(int(10 ** chance.uniform(0, 4))) if chance.random() < 1 / 15 else word for word in drawn]
        if chance.random() < unusual:
            drawn.append(chance.choice(UNUSUAL))
        caption = " ".join(drawn)
        if caption not in seen:
            seen.add(caption)
            yield caption


def load_peer() -> Callable:
    """Returns OpenAI's SimpleTokenizer class, loaded from its file, since importing ``clip`` needs PyTorch."""
    path = pathlib.Path(importlib.util.find_spec("clip").origin).with_name("simple_tokenizer.py")
    spec = importlib.util.spec_from_file_location("openai_simple_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer


def seconds(work: Callable[[], object]) -> float:
    """Returns how long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(label: str, rounds: int, count: int, captions: Iterator[str], peer: object, cold: bool) -> float:
    """Times both on ``count`` new captions per round, alternating the order; prints and returns the median ratio."""
    ours_times, peer_times = [], []
    empty_peer_cache = dict(peer.cache)
    for turn in range(rounds):
        batch = list(itertools.islice(captions, count))
        if cold:
            tokenizer._encode_cached.cache_clear()
            peer.cache = dict(empty_peer_cache)
        runs = [
            (ours_times, lambda batch=batch: tokenizer.tokenize(batch, truncate=True)),
            (peer_times, lambda batch=batch: [peer.encode(caption) for caption in batch]),
        ]
        for times, work in runs if turn % 2 else reversed(runs):
            times.append(seconds(work))
    ratios = [theirs / own for theirs, own in zip(peer_times, ours_times, strict=True)]
    print(
        f"{label}: openai {count / statistics.median(peer_times):,.0f} captions/s, "
        f"clip_jax {count / statistics.median(ours_times):,.0f} captions/s, "
        f"ratio {statistics.median(ratios):.1f} (rounds {min(ratios):.1f} to {max(ratios):.1f})"
    )
    return statistics.median(ratios)


def measure_alone(rounds: int, count: int, captions: Iterator[str]) -> None:
    batches = [list(itertools.islice(captions, count)) for _ in range(rounds)]
    times = [seconds(lambda batch=batch: tokenizer.tokenize(batch, truncate=True)) for batch in batches]
    print(f"clip_jax {count / statistics.median(times):,.0f} captions/s")


def main() -> None:
    """Checks that both return the same ids, then measures cold and warm rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=20_000, help="captions in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--unusual", type=float, default=0.05, help="share of captions with unusual characters")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    captions = caption_stream(arguments.seed, arguments.unusual)
    if not has_peer("OpenAI's tokenizer", "clip"):
        measure_alone(arguments.rounds, arguments.captions, captions)
        return
    peer = load_peer()()
    empty_peer_cache = dict(peer.cache)
    for caption in itertools.islice(captions, 2_000):
        row = tokenizer.tokenize(caption, context_length=400)[0]
        ids = [tokenizer.START_OF_TEXT, *peer.encode(caption), tokenizer.END_OF_TEXT]
        if row[: len(ids)].tolist() != ids or row[len(ids) :].any():
            sys.exit(f"the ids of {caption!r} differ from OpenAI's: {row[: len(ids)].tolist()} instead of {ids}")
    peer.cache = empty_peer_cache
    measure("cold caches", arguments.rounds, arguments.captions, captions, peer, cold=True)
    ratio = measure("warm caches", arguments.rounds, arguments.captions, captions, peer, cold=False)
    print(f"ratio: {ratio:.1f}")


if __name__ == "__main__":
    main()
