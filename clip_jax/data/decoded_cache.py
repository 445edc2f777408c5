"""Caches decoded images in memory, for data sets small enough to be read from there in every epoch."""

import threading

import numpy as np

from clip_jax.data.sources import Pair

MIB = 2**20


class DecodedCache:
    """Caches pairs with their decoded pixels by index, until it is full. Nothing is evicted.

    In a shuffled epoch every pair is equally likely to be next, so no pair is better to cache than the first ones.
    Each process has its own cache: the copy that a worker gets is empty.

    Args:
      mebibytes: largest total size of the pixels. 0 caches nothing.
    """

    def __init__(self, mebibytes: int):
        self._mebibytes, self._left = mebibytes, mebibytes * MIB
        self._cached: dict[int, tuple[Pair, np.ndarray, tuple[int, int]]] = {}
        self._lock = threading.Lock()

    def __reduce__(self):
        return DecodedCache, (self._mebibytes,)

    def get(self, index: int) -> tuple[Pair, np.ndarray, tuple[int, int]] | None:
        """Returns the pair without its encoded image, the pixels, and the image's width and height, or None."""
        return self._cached.get(index)

    def add(self, index: int, pair: Pair, pixels: np.ndarray, size: tuple[int, int]) -> None:
        """Caches an entry if there is room. ``pixels`` uint8 ``[H, W, 3]`` must not be changed afterwards."""
        with self._lock:
            if index not in self._cached and pixels.nbytes <= self._left:
                self._left -= pixels.nbytes
                self._cached[index] = pair._replace(image=b""), pixels, size
