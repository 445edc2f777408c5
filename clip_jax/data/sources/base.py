"""What a source of pairs is, and what it says when a record is none."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from clip_jax.errors import FailedError


class Pair(NamedTuple):
    """An encoded image, at least one caption of it, a name for it in messages, and its class if it has one.

    Several classes stand one a line in ``label``.
    ``weights`` say how often each caption is drawn, relative to the others; empty: all alike.
    """

    image: bytes
    captions: Sequence[str]
    key: str
    label: str = ""
    weights: Sequence[float] = ()


class PairError(ValueError):
    """A record that is no pair; the message is one line that says which and why, ``reason`` is a word to count by."""

    def __init__(self, message: str, reason: str = "damaged_record"):
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.args[0]


class MissingPackageError(ValueError):
    """What reads a source is not installed; one line that says how to install it."""


class ShardError(FailedError, OSError):
    """A file of many pairs is gone or has changed, which no replacement of samples can mend; one line."""


class Source(Protocol):
    """Random access to pairs. Must be picklable: worker processes get a copy, so nothing large may be part of it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair:
        """Raises PairError if this record cannot be used, ShardError if the file that held it is lost."""
        ...

    def notes(self) -> list[str]:
        """What of its files gives neither a pair nor a bad sample, and what could be mistaken: a line each."""
        ...

    def fingerprint(self) -> str:
        """A digest that changes when the pairs or their order do; two runs over equal sources see equal data."""
        ...
