"""Image-text retrieval: recall at 1, 5 and 10 in both directions (section 3.1, table 13 of the CLIP paper)."""

import numpy as np

from clip_jax.evaluation.similarity import Candidates

RECALL_AT = (1, 5, 10)
NO_MATCH = 2**31 - 1  # the rank of a query without a matching candidate
BLOCK_BYTES = 2**26  # of scores in memory at a time


def ranks(scores: np.ndarray, query_ids: np.ndarray, candidate_ids: np.ndarray) -> np.ndarray:
    """Returns how many wrong candidates rank before each query's first match, int32 ``[Q]``; 0 is the best.

    A wrong candidate with the same score as the match, or with the score NaN, ranks before it. The rank of a query
    without a match is ``NO_MATCH``.

    Args:
      scores: ``[Q, C]``, higher is more similar.
      query_ids: int ``[Q]``. A candidate matches a query if their ids are equal.
      candidate_ids: int ``[C]``.
    """
    matches = query_ids[:, None] == candidate_ids[None, :]  # [Q, C]
    best_match = np.where(matches, scores, -np.inf).max(axis=1, keepdims=True)
    # Not ">=", which is False for NaN.
    ahead = (~matches & ~(scores < best_match)).sum(axis=1)
    return np.where(matches.any(axis=1), ahead, NO_MATCH).astype(np.int32)


def retrieval_ranks(
    queries: np.ndarray, candidates: np.ndarray, query_ids: np.ndarray, candidate_ids: np.ndarray
) -> np.ndarray:
    """Returns :func:`ranks` of unit vectors float32 ``[Q, D]`` and ``[C, D]``, without ``[Q, C]`` in memory at once."""
    distinct = Candidates(candidates)
    block = max(1, BLOCK_BYTES // (4 * len(candidates)))
    starts = range(0, len(queries), block)
    parts = [
        ranks(distinct.scores(queries[start : start + block]), query_ids[start : start + block], candidate_ids)
        for start in starts
    ]
    return np.concatenate(parts)


def recalls(image_to_text_ranks: np.ndarray, text_to_image_ranks: np.ndarray) -> dict[str, float]:
    """Returns ``image_to_text_recall@k`` and ``text_to_image_recall@k``: the share of queries with a rank below k."""
    ranks_of = {"image_to_text": image_to_text_ranks, "text_to_image": text_to_image_ranks}
    return {f"{way}_recall@{k}": float((rank < k).mean()) for way, rank in ranks_of.items() for k in RECALL_AT}


def chance(image_ids: np.ndarray, text_ids: np.ndarray) -> dict[str, float]:
    """Returns the expected :func:`recalls` of a random order."""

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
    """Returns the indices of each query's ``count`` most similar candidates, int32 ``[Q, count]``, the best first."""
    scores = Candidates(candidates).scores(queries)
    return np.argsort(-scores, axis=1, kind="stable")[:, :count].astype(np.int32)
