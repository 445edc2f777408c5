"""Decides what happens to records that share a key, when a source is converted to shards.

Records with the same image become one record with all captions. Records with another image are left out.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from clip_jax.data.sources import Pair

DIGEST_BYTES = 16  # long enough that no two of a billion keys or images share a digest by chance


class Plan(NamedTuple):
    """What to do with the repeated records of one shard. Records are named by their index in the source.

    ``duplicates`` have the key of an earlier record and another image; ``merged`` have its image, too. Each list of
    ``groups`` starts with a record of this shard, and goes on with the records that are merged into it.
    """

    duplicates: list[int]
    merged: list[int]
    groups: list[list[int]]


def plan_merges(notes: Iterable[dict], pairs_per_shard: int) -> dict[int, Plan]:
    """Returns the plan of each shard with records to leave out or merge, by shard. Takes 40 bytes of memory per pair.

    Args:
      notes: for each shard, as bytes: ``records``, the indices of its usable records (int64), and the digests of their
        ``keys`` and ``images``.
      pairs_per_shard: how many records of the source a shard covers.
    """
    records, keys, images = [], [], []
    for note in notes:
        records.append(np.frombuffer(note["records"], np.int64))
        keys.append(np.frombuffer(note["keys"], f"V{DIGEST_BYTES}"))
        images.append(np.frombuffer(note["images"], f"V{DIGEST_BYTES}"))
    records, keys, images = map(np.concatenate, (records, keys, images))
    _, firsts, of_key = np.unique(keys.view("u8,u8"), return_index=True, return_inverse=True)
    first = firsts[of_key]  # for each record, the position of the first one with its key
    plans: dict[int, Plan] = {}
    groups: dict[int, list[int]] = {}
    for position in np.flatnonzero(first != np.arange(len(records))).tolist():
        record, kept = int(records[position]), int(first[position])
        plan = plans.setdefault(record // pairs_per_shard, Plan([], [], []))
        if images[position] != images[kept]:
            plan.duplicates.append(record)
            continue
        plan.merged.append(record)
        into = int(records[kept])
        if into not in groups:
            groups[into] = [into]
            plans.setdefault(into // pairs_per_shard, Plan([], [], [])).groups.append(groups[into])
        groups[into].append(record)
    return plans


def merge(pairs: Sequence[Pair]) -> Pair:
    """Returns the first pair with the captions and classes of all pairs, each once.

    If a pair has proportions for its captions, the captions of a pair without get equal ones that sum to 1. A caption
    of several pairs gets the sum of its proportions.
    """
    proportions: dict[str, float] = {}
    for pair in pairs:
        equal = [1 / len(pair.captions)] * len(pair.captions)
        for caption, proportion in zip(pair.captions, pair.proportions or equal, strict=True):
            proportions[caption] = proportions.get(caption, 0.0) + float(proportion)
    labels = dict.fromkeys(label for pair in pairs for label in pair.label.split("\n") if label)
    weighted = any(len(pair.proportions) for pair in pairs)
    return pairs[0]._replace(
        captions=list(proportions), label="\n".join(labels), proportions=list(proportions.values()) if weighted else []
    )
