"""Reads scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, for an evaluation that takes one second."""

import io

from PIL import Image

from clip_jax.data.sources.base import MissingPackageError, Pair
from clip_jax.data.sources.digest import digest

SPLITS = {"train": slice(0, 898), "test": slice(898, 1797)}  # halves, as in scikit-learn's own example


class DigitsSource:
    """Pairs of one split. The digit is the class and the caption.

    Raises:
      MissingPackageError: scikit-learn is not installed.
      ValueError: there is no such split.
    """

    def __init__(self, split: str):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise MissingPackageError(f"digits:{split} needs scikit-learn: pip install 'clip-jax-tpu[eval]'") from None
        if split not in SPLITS:
            raise ValueError(f"digits:{split}: the splits are {' and '.join(SPLITS)}")
        data, self._split = load_digits(), split
        # Ink values 0 to 16 become black on white, like photographs of digits.
        self._images = (255 - data.images[SPLITS[split]] * 255 / 16).round().astype("uint8")  # [M, 8, 8]
        self._labels = data.target[SPLITS[split]]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Pair:
        stream = io.BytesIO()
        Image.fromarray(self._images[index]).save(stream, "PNG")
        label = str(self._labels[index])
        return Pair(stream.getvalue(), [label], f"digits/{self._split}, record {index}", label)

    def notes(self) -> list[str]:
        return []

    def fingerprint(self) -> str:
        return digest("digits", self._split, len(self))
