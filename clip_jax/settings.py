"""Helpers to declare a section of the config: a dataclass of defaults, in the module that the section configures.

:mod:`clip_jax.config` joins all sections. The method ``problems`` of a section returns one line for each mistake.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

DTYPES = ("float32", "bfloat16")
_MAY_CHANGE = "may_change"


def may_change(default: Any) -> Any:
    """Declares a field with this default that a resumed run may change: it does not change what is computed."""
    return dataclasses.field(default=default, metadata={_MAY_CHANGE: True})


def changeable(section: type) -> set[str]:
    """Returns the names of the fields that are declared with :func:`may_change`."""
    return {field.name for field in dataclasses.fields(section) if field.metadata.get(_MAY_CHANGE)}


def must_be(condition: bool, problem: str) -> list[str]:
    """Returns ``[problem]`` unless the condition holds."""
    return [] if condition else [problem]


def must_be_positive(section: Any, names: Collection[str], prefix: str) -> list[str]:
    """Returns a problem for each of these fields that is not above zero."""
    return [f"{prefix}.{name} must be positive" for name in names if not getattr(section, name) > 0]


def must_not_be_negative(section: Any, names: Collection[str], prefix: str) -> list[str]:
    """Returns a problem for each of these fields that is below zero."""
    return [f"{prefix}.{name} must not be negative" for name in names if getattr(section, name) < 0]


def must_be_one_of(section: Any, name: str, choices: Collection[str], prefix: str) -> list[str]:
    """Returns a problem if this field is not one of the choices."""
    value = getattr(section, name)
    return must_be(value in choices, f"{prefix}.{name}={value!r} must be one of {', '.join(choices)}")


def read_section(section: type, values: Mapping[str, Any]) -> Any:
    """Returns the section with these values of a config; keys that it does not declare are ignored."""
    declared = {field.name: field for field in dataclasses.fields(section)}
    return section(**{name: _read(values[name], field) for name, field in declared.items()})


def _read(value: Any, field: dataclasses.Field) -> Any:
    nested = field.default_factory if dataclasses.is_dataclass(field.default_factory) else None
    return read_section(nested, value) if nested else value
