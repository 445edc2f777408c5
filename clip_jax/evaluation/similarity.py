"""Cosines of queries with candidates, in which candidates that are equal get scores that are equal."""

import hashlib

import numpy as np


class Candidates:
    """Candidate embeddings float32 ``[C, D]``, of which each distinct one is compared once.

    A matrix product rounds a column by where it stands, so of two equal candidates one would be ahead by the last bit,
    and a tie would be no tie.
    """

    def __init__(self, embeddings: np.ndarray):
        places: dict[bytes, int] = {}
        rows = np.ascontiguousarray(embeddings)
        self.place = np.array([places.setdefault(hashlib.sha256(row).digest(), len(places)) for row in rows])
        _, firsts = np.unique(self.place, return_index=True)
        self._distinct = rows if len(places) == len(rows) else rows[firsts]  # [distinct, D]

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """Float32 ``[Q, D]`` to cosines float32 ``[Q, C]``."""
        scores = queries @ self._distinct.T
        return scores if len(self._distinct) == len(self.place) else scores[:, self.place]


def copies(embeddings: np.ndarray) -> int:
    """The number of rows, of embeddings ``[C, D]``, that equal an earlier row."""
    place = Candidates(embeddings).place
    return len(place) - len(np.unique(place))


def ties(embeddings: np.ndarray, ids: np.ndarray) -> int:
    """The number of rows, of embeddings ``[C, D]``, that equal a row with another id; ``ids`` is int ``[C]``."""
    place = Candidates(embeddings).place
    pairs = np.unique(np.stack([place, ids]), axis=1)  # each embedding with each of its ids, once
    return int((np.bincount(pairs[0])[place] > 1).sum())
