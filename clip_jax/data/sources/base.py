"""The Source protocol, and the errors that a source raises."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from clip_jax.errors import FailedError


class Pair(NamedTuple):
    """An encoded image, its captions (at least one), its name in messages, and its class if it has one.

    ``label`` has one class per line. ``proportions`` are how often each caption is drawn relative to the others; if
    empty, all are equally likely.
    """

    image: bytes
    captions: Sequence[str]
    key: str
    label: str = ""
    proportions: Sequence[float] = ()


class PairError(ValueError):
    """A record cannot be used. The message is one line; ``reason`` is one of ``bad_samples.REASONS``."""

    def __init__(self, message: str, reason: str = "damaged_record"):
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.args[0]


class MissingPackageError(ValueError):
    """A package that reads a source is not installed. The message is how to install it."""


class ShardError(FailedError, OSError):
    """A file of many pairs is gone or has changed. Replacing single samples cannot fix that."""


class Source(Protocol):
    """Random access to pairs. It must be picklable and small, since every worker process gets a copy."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair:
        """Returns a pair. Raises PairError if the record cannot be used, ShardError if its file is lost."""
        ...

    def notes(self) -> list[str]:
        """Returns lines about what is not used of its files, and about options that could be misunderstood."""
        ...

    def fingerprint(self) -> str:
        """Returns a digest that changes when the pairs or their order change."""
        ...
