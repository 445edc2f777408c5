"""Computes cosine similarities of query and candidate embeddings. Equal candidates get exactly equal scores."""

import hashlib

import numpy as np


class Candidates:
    """Candidate embeddings float32 ``[C, D]``. Equal ones are compared once.

    The rounding of a matrix product depends on the position of a column. Two equal candidates could otherwise differ in
    the last bit, which would hide a tie.
    """

    def __init__(self, embeddings: np.ndarray):
        indices: dict[bytes, int] = {}
        rows = np.ascontiguousarray(embeddings)
        self.index = np.array([indices.setdefault(hashlib.sha256(row).digest(), len(indices)) for row in rows])
        _, firsts = np.unique(self.index, return_index=True)
        self._distinct = rows if len(indices) == len(rows) else rows[firsts]  # [distinct, D]

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """Returns the cosines of queries float32 ``[Q, D]`` with the candidates, float32 ``[Q, C]``."""
        scores = queries @ self._distinct.T
        return scores if len(self._distinct) == len(self.index) else scores[:, self.index]


def num_copies(embeddings: np.ndarray) -> int:
    """Returns how many rows of ``embeddings``, ``[C, D]``, equal an earlier row."""
    index = Candidates(embeddings).index
    return len(index) - len(np.unique(index))


def num_ties(embeddings: np.ndarray, ids: np.ndarray) -> int:
    """Returns how many rows of ``embeddings``, ``[C, D]``, equal a row with another id; ``ids`` is int ``[C]``."""
    index = Candidates(embeddings).index
    pairs = np.unique(np.stack([index, ids]), axis=1)  # each embedding with each of its ids, once
    return int((np.bincount(pairs[0])[index] > 1).sum())
