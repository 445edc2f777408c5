"""Looks up the names of classes that a data set stores as numbers."""

import json
from collections.abc import Callable, Mapping, Sequence

from clip_jax.data.sources.base import PairError
from clip_jax.data.sources.fields import column_of

LISTS = ("Sequence", "List", "LargeList")  # types of Hugging Face's features with several values


def features_of(metadata: Mapping[bytes, bytes] | None) -> dict:
    """Returns the features that Hugging Face's ``datasets`` stores in a Parquet file's metadata; empty if none."""
    try:
        return json.loads((metadata or {})[b"huggingface"])["info"]["features"] or {}
    except (KeyError, TypeError, ValueError):
        return {}


def names_of(features: object, path: str) -> list[str]:
    """Returns the names of the ClassLabel at a path of keys joined by dots, in the order of its numbers; else empty."""
    while isinstance(features, list) or (isinstance(features, dict) and features.get("_type") in LISTS):
        features = (features or [None])[0] if isinstance(features, list) else features.get("feature")
    if not isinstance(features, dict):
        return []
    if path:
        column = column_of(features, path)
        return [] if column is None else names_of(features[column], path[len(column) + 1 :])
    if features.get("_type") != "ClassLabel":
        return []
    names = features.get("names") or []
    return [str(names[key]) for key in sorted(names, key=int)] if isinstance(names, dict) else list(map(str, names))


def with_names(
    get: Callable[[str], object], names: Mapping[str, Sequence[str]], record: str
) -> Callable[[str], object]:
    """Returns a getter that gives the name of a class instead of its number, and None for -1 (no class).

    Args:
      get: from a field's name to its value.
      names: the names of the classes, by field. The values of other fields are unchanged.
      record: name of the record, for messages.

    Returns:
      The getter. It raises PairError for a number without a name.
    """

    def name_of(field: str, value: object) -> object:
        if isinstance(value, list | tuple):
            return [name_of(field, one) for one in value]
        if not isinstance(value, int):
            return value
        if not -1 <= value < len(names[field]):
            raise PairError(f"{record}: {field} is {value}, but there are {len(names[field])} classes")
        return names[field][value] if value >= 0 else None

    def value_of(field: str) -> object:
        return name_of(field, get(field)) if names.get(field) else get(field)

    return value_of
