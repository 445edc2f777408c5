"""Decoded images kept in memory, for data sets that are small enough to be read from there in each epoch."""

import threading

import numpy as np

from clip_jax.data.sources import Pair

MIB = 2**20


class DecodedCache:
    """Pairs with their decoded pixels by index, until the budget is spent; nothing is ever evicted.

    In a shuffled epoch each pair is as likely as any other to be the next, so the first ones are as good as any.
    Each process has its own: a copy that is sent to a worker starts empty.

    Args:
      mebibytes: how much the pixels may take. 0 keeps nothing.
    """

    def __init__(self, mebibytes: int):
        self._mebibytes, self._left = mebibytes, mebibytes * MIB
        self._kept: dict[int, tuple[Pair, np.ndarray, tuple[int, int]]] = {}
        self._lock = threading.Lock()

    def __reduce__(self):
        return DecodedCache, (self._mebibytes,)

    def get(self, index: int) -> tuple[Pair, np.ndarray, tuple[int, int]] | None:
        """The pair without its encoded image, the pixels, and the image's own width and height; None if not kept."""
        return self._kept.get(index)

    def add(self, index: int, pair: Pair, pixels: np.ndarray, size: tuple[int, int]) -> None:
        """Keeps an entry if there is room. ``pixels`` are uint8 ``[H, W, 3]`` and must not be written to."""
        with self._lock:
            if index not in self._kept and pixels.nbytes <= self._left:
                self._left -= pixels.nbytes
                self._kept[index] = pair._replace(image=b""), pixels, size
