"""Image-text retrieval: recall at 1, 5 and 10 in both directions (section 3.1, table 13 of the paper)."""

import numpy as np

from clip_jax.evaluation.similarity import Candidates

RECALL_AT = (1, 5, 10)
NONE = 2**31 - 1  # the rank of a query without a right candidate
BLOCK_BYTES = 2**26  # of scores that are held at a time


def ranks(scores: np.ndarray, query_ids: np.ndarray, candidate_ids: np.ndarray) -> np.ndarray:
    """How many wrong candidates stand before each query's first right one: int32 ``[Q]``, 0 is the best.

    Args:
      scores: ``[Q, C]``, higher is more alike.
      query_ids: int ``[Q]``; a query's right candidates are those that share its id.
      candidate_ids: int ``[C]``.

    A tie with a wrong candidate counts against the query, and so does a score that is not a number. Without any right
    candidate the rank is ``NONE``.
    """
    matches = query_ids[:, None] == candidate_ids[None, :]  # [Q, C]
    best_match = np.where(matches, scores, -np.inf).max(axis=1, keepdims=True)
    # "Not below" instead of "at least": true for a score that isn't a number, which so ranks first.
    ahead = (~matches & ~(scores < best_match)).sum(axis=1)
    return np.where(matches.any(axis=1), ahead, NONE).astype(np.int32)


def retrieval_ranks(
    queries: np.ndarray, candidates: np.ndarray, query_ids: np.ndarray, candidate_ids: np.ndarray
) -> np.ndarray:
    """The same from unit vectors float32 ``[Q, D]`` and ``[C, D]``; never holds ``[Q, C]``."""
    among = Candidates(candidates)
    block = max(1, BLOCK_BYTES // (4 * len(candidates)))
    starts = range(0, len(queries), block)
    parts = [
        ranks(among.scores(queries[start : start + block]), query_ids[start : start + block], candidate_ids)
        for start in starts
    ]
    return np.concatenate(parts)


def recalls(image_to_text_ranks: np.ndarray, text_to_image_ranks: np.ndarray) -> dict[str, float]:
    """``image_to_text_recall@k`` and ``text_to_image_recall@k``: the share of queries with a right one among k."""
    found = {"image_to_text": image_to_text_ranks, "text_to_image": text_to_image_ranks}
    return {f"{way}_recall@{k}": float((rank < k).mean()) for way, rank in found.items() for k in RECALL_AT}


def chance(image_ids: np.ndarray, text_ids: np.ndarray) -> dict[str, float]:
    """The same for an order drawn at random."""

    def expected(query_ids: np.ndarray, candidate_ids: np.ndarray, k: int) -> float:
        size = max(query_ids.max(), candidate_ids.max()) + 1
        right = np.bincount(candidate_ids, minlength=size)[query_ids].astype(float)  # [Q]
        all_wrong = np.ones(len(query_ids))
        for drawn in range(min(k, len(candidate_ids))):
            all_wrong *= np.maximum(len(candidate_ids) - right - drawn, 0) / (len(candidate_ids) - drawn)
        return float(1 - all_wrong.mean())

    return {f"image_to_text_recall@{k}": expected(image_ids, text_ids, k) for k in RECALL_AT} | {
        f"text_to_image_recall@{k}": expected(text_ids, image_ids, k) for k in RECALL_AT
    }


def nearest(queries: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` most alike candidates of each query, int32 ``[Q, count]``, the most alike first."""
    scores = Candidates(candidates).scores(queries)
    return np.argsort(-scores, axis=1, kind="stable")[:, :count].astype(np.int32)
