"""Names of classes that a data set stores as numbers."""

import json
from collections.abc import Callable, Mapping, Sequence

from clip_jax.data.sources.base import PairError
from clip_jax.data.sources.fields import column_of

LISTS = ("Sequence", "List", "LargeList")  # Hugging Face's features of several values


def features_of(metadata: Mapping[bytes, bytes] | None) -> dict:
    """The features that Hugging Face's ``datasets`` writes into a Parquet file's metadata; empty if it has none."""
    try:
        return json.loads((metadata or {})[b"huggingface"])["info"]["features"] or {}
    except (KeyError, TypeError, ValueError):
        return {}


def names_of(features: object, path: str) -> list[str]:
    """The names of the ClassLabel at a path of keys with dots between, in the order of its numbers; else empty."""
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
    """The same getter, but of the number of a class its name; of -1, which stands for no class, None.

    Args:
      get: from a field's name to its value.
      names: of the classes, by field; a field without is left as it is.
      record: its name, for messages.

    Returns:
      The getter, which raises PairError for a number without a name.
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
