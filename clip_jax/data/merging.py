"""Records of one key: those of the same picture become one with all their captions, those of another are left out."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from clip_jax.data.sources import Pair

DIGEST_BYTES = 16  # of a key's or picture's digest: no two of a billion are alike by chance


class Plan(NamedTuple):
    """What is done with the repeated records of one shard, by their index in the source.

    ``duplicates`` have the key of an earlier record and another picture; ``merged`` have its picture, too. ``takes`` is
    for each record of the shard that others are merged into: itself, and those.
    """

    duplicates: list[int]
    merged: list[int]
    takes: list[list[int]]


def plan_shards(notes: Iterable[dict], pairs_per_shard: int) -> dict[int, Plan]:
    """The plan of each shard that has something to leave out or to merge; 40 bytes of memory a pair.

    Args:
      notes: of all shards, each with the ``records`` of the source that can be used (int64), and the digests of their
        ``keys`` and ``images``, all as bytes.
      pairs_per_shard: how many records of the source a shard stands for.
    """
    records, keys, images = [], [], []
    for note in notes:
        records.append(np.frombuffer(note["records"], np.int64))
        keys.append(np.frombuffer(note["keys"], f"V{DIGEST_BYTES}"))
        images.append(np.frombuffer(note["images"], f"V{DIGEST_BYTES}"))
    records, keys, images = map(np.concatenate, (records, keys, images))
    _, firsts, of_key = np.unique(keys.view("u8,u8"), return_index=True, return_inverse=True)
    first = firsts[of_key]  # of each record, the place of the first with its key
    plans: dict[int, Plan] = {}
    takes: dict[int, list[int]] = {}
    for place in np.flatnonzero(first != np.arange(len(records))).tolist():
        record, kept = int(records[place]), int(first[place])
        plan = plans.setdefault(record // pairs_per_shard, Plan([], [], []))
        if images[place] != images[kept]:
            plan.duplicates.append(record)
            continue
        plan.merged.append(record)
        into = int(records[kept])
        if into not in takes:
            takes[into] = [into]
            plans.setdefault(into // pairs_per_shard, Plan([], [], [])).takes.append(takes[into])
        takes[into].append(record)
    return plans


def merge(pairs: Sequence[Pair]) -> Pair:
    """The first pair with the captions and classes of all, each once.

    Where a pair has weights for its captions, those of a pair without are alike and sum to 1, and a caption that
    several pairs have gets the sum of its weights.
    """
    weights: dict[str, float] = {}
    for pair in pairs:
        alike = [1 / len(pair.captions)] * len(pair.captions)
        for caption, weight in zip(pair.captions, pair.weights or alike, strict=True):
            weights[caption] = weights.get(caption, 0.0) + float(weight)
    labels = dict.fromkeys(label for pair in pairs for label in pair.label.split("\n") if label)
    weighted = any(len(pair.weights) for pair in pairs)
    return pairs[0]._replace(
        captions=list(weights), label="\n".join(labels), weights=list(weights.values()) if weighted else []
    )
