"""Image-text retrieval: recall at 1, 5 and 10 in both directions."""

import numpy as np

RECALL_AT = (1, 5, 10)


def recall_at_k(scores: np.ndarray, query_ids: np.ndarray, candidate_ids: np.ndarray) -> dict[int, float]:
    """Share of queries with a candidate of the same id among the first k, for k in 1, 5, 10.

    Args:
      scores: ``[Q, C]``, higher is more alike.
      query_ids: int ``[Q]``; a query's matches are the candidates that share its id.
      candidate_ids: int ``[C]``.

    A tie with a wrong candidate counts against the query, and so do a score that is not a number and having no match.
    """
    matches = query_ids[:, None] == candidate_ids[None, :]  # [Q, C]
    best_match = np.where(matches, scores, -np.inf).max(axis=1, keepdims=True)
    # "Not below" instead of "at least": true for a score that isn't a number, which so ranks first.
    ahead = (~matches & ~(scores < best_match)).sum(axis=1)
    has_match = matches.any(axis=1)
    return {k: float((has_match & (ahead < k)).mean()) for k in RECALL_AT}


def retrieval_metrics(
    image_embeddings: np.ndarray, text_embeddings: np.ndarray, image_ids: np.ndarray, text_ids: np.ndarray
) -> dict[str, float]:
    """``image_to_text_recall@k`` and ``text_to_image_recall@k`` from unit vectors ``[I, D]`` and ``[T, D]``."""
    scores = image_embeddings @ text_embeddings.T
    directions = {
        "image_to_text": recall_at_k(scores, image_ids, text_ids),
        "text_to_image": recall_at_k(scores.T, text_ids, image_ids),
    }
    return {f"{name}_recall@{k}": value for name, recalls in directions.items() for k, value in recalls.items()}
