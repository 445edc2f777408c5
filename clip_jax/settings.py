"""How a section of the config is declared: a dataclass of defaults that marks what a resumed run may change.

A section lives beside the code that it configures, and :mod:`clip_jax.config` composes them. Its method ``problems``
returns one line for each mistake.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

DTYPES = ("float32", "bfloat16")
_MAY_CHANGE = "may_change"


def may_change(default: Any) -> Any:
    """The default of a field that may differ between a run and its resumption: it does not change what is computed."""
    return dataclasses.field(default=default, metadata={_MAY_CHANGE: True})


def changeable(section: type) -> set[str]:
    """The names of the fields that were declared with :func:`may_change`."""
    return {field.name for field in dataclasses.fields(section) if field.metadata.get(_MAY_CHANGE)}


def must_be(condition: bool, problem: str) -> list[str]:
    """``[problem]`` unless the condition holds, for adding up the problems of a section."""
    return [] if condition else [problem]


def must_be_positive(section: Any, names: Collection[str], prefix: str) -> list[str]:
    """A problem for each of these fields that is not above zero."""
    return [f"{prefix}.{name} must be positive" for name in names if not getattr(section, name) > 0]


def must_not_be_negative(section: Any, names: Collection[str], prefix: str) -> list[str]:
    """A problem for each of these fields that is below zero."""
    return [f"{prefix}.{name} must not be negative" for name in names if getattr(section, name) < 0]


def must_be_one_of(section: Any, name: str, choices: Collection[str], prefix: str) -> list[str]:
    """A problem if this field is none of the choices."""
    value = getattr(section, name)
    return must_be(value in choices, f"{prefix}.{name}={value!r} must be one of {', '.join(choices)}")


def read_section(section: type, values: Mapping[str, Any]) -> Any:
    """The section with these values of a config; keys that it does not declare are left out."""
    declared = {field.name: field for field in dataclasses.fields(section)}
    return section(**{name: _read(values[name], field) for name, field in declared.items()})


def _read(value: Any, field: dataclasses.Field) -> Any:
    nested = field.default_factory if dataclasses.is_dataclass(field.default_factory) else None
    return read_section(nested, value) if nested else value
