"""Matches the classes that a source names with the classes of a task, by one rule that never guesses.

1. A class of the source is one of the task's ``labels``, if the task has any, else one of its class names. Equal
   strings match; else strings that are equal without case, spaces and punctuation match, which is noted in the result.
2. If none of the source's classes matches, all of them are whole numbers and no class name is a number, the numbers are
   indices into the class names, from 0.
3. Two classes of a source are never one class of the task, and one class of a source is never two.
4. What still matches nothing is refused, or left out and counted; the caller chooses which.
"""

import difflib
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from clip_jax.evaluation.pictures import Said

NAMED = 3  # classes that a message names before it counts the others


class Matching(NamedTuple):
    """``number_of`` is the class number in ``[0, C)`` of each source class that matches, ``unknown`` the others.

    ``loosely`` holds those that match without case, spaces and punctuation only, with the name that they match.
    """

    number_of: dict[str, int]
    unknown: list[str]
    loosely: dict[str, str]


class LabelledRows(NamedTuple):
    """Rows of a source that count, int ``[M]``, the class numbers of each, and sentences about what was left out."""

    rows: list[int]
    classes: list[list[int]]
    notes: list[str]


def check_names(class_names: Sequence[str], labels: Sequence[str]) -> None:
    """Raises ValueError unless every name and label is a text and ``labels`` goes with ``class_names``."""
    for key, values in (("class_names", class_names), ("labels", labels)):
        empty = [place for place, value in enumerate(values) if not value.strip()]
        if empty:
            raise ValueError(f"{key} has an empty entry at index {empty[0]}; give every class a name")
    if labels and len(labels) != len(class_names):
        raise ValueError(f"{len(class_names)} class_names for {len(labels)} labels; give one label for each class name")
    twice = [label for label in labels if labels.count(label) > 1] if len(set(labels)) < len(labels) else []
    if twice:
        raise ValueError(f"the label {twice[0]!r} is there twice; each class needs a label of its own")


def match_classes(found: Iterable[str], class_names: Sequence[str], labels: Sequence[str] = ()) -> Matching:
    """Applies steps 1 to 3 of the rule at the top of this file.

    Args:
      found: what the source calls its classes, each once.
      class_names: of the task, C of them, after :func:`check_names`.
      labels: what sources call these classes, in the same order; empty where sources use the class names.

    Raises:
      ValueError: a class could be several, two classes would be one, or an index is out of range; one line.
    """
    keys = labels or class_names
    exactly, without_marks = defaultdict(list), defaultdict(list)
    for number, key in enumerate(keys):
        exactly[key].append(number)
        without_marks[plain(key)].append(number)
    number_of, unknown, loosely = {}, [], {}
    for label in found:
        numbers = exactly.get(label) or (without_marks.get(plain(label)) if plain(label) else None) or []
        if len(numbers) > 1:
            same = " and ".join(repr(keys[number]) for number in numbers[:2])
            raise ValueError(f"the class {label!r} could be {len(numbers)} of the classes ({same}); give labels, too")
        if not numbers:
            unknown.append(label)
            continue
        number_of[label] = numbers[0]
        if label not in exactly:
            loosely[label] = keys[numbers[0]]
    numbered = not labels and all(map(str.isdecimal, unknown)) and not any(map(str.isdecimal, class_names))
    if unknown and not number_of and numbered:
        number_of, unknown = _by_index(unknown, len(class_names)), []
    _check_one_to_one(number_of, keys)
    return Matching(number_of, unknown, loosely)


def plain(text: str) -> str:
    """The text without case, spaces and punctuation: ``Great_White-Shark`` is ``greatwhiteshark``."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter for letter in folded if letter.isalnum() or unicodedata.category(letter).startswith("M"))


def _by_index(found: Sequence[str], count: int) -> dict[str, int]:
    highest = max(map(int, found))
    if highest >= count:
        raise ValueError(
            f"its labels go up to {highest}, which needs {highest + 1} class names, but there are {count}; numbers "
            "count from 0"
        )
    return {label: int(label) for label in found}


def _check_one_to_one(number_of: dict[str, int], keys: Sequence[str]) -> None:
    first: dict[int, str] = {}
    for label, number in number_of.items():
        other = first.setdefault(number, label)
        if other != label:
            raise ValueError(
                f"its classes {other!r} and {label!r} would both be {keys[number]!r}; merge them or rename one"
            )


def no_match(unknown: Sequence[str], found: int, class_names: Sequence[str], labels: Sequence[str]) -> str:
    """The message for classes of a task's own source that match nothing."""
    keys = list(labels or class_names)
    shown = []
    for label in unknown[:NAMED]:
        near = difflib.get_close_matches(label, keys, n=1)
        shown.append(repr(label) + (f" (did you mean {near[0]!r}?)" if near else ""))
    what = "labels" if labels and list(labels) != list(class_names) else "class names"
    return (
        f"{len(unknown):,} of its {found:,} classes are none of the task's {len(keys):,} {what}: "
        f"{_list(shown, unknown)}; correct the names, or give labels in the order of class_names"
    )


def choose_rows(
    said: Sequence[Said], matching: Matching, class_names: Sequence[str], several: bool, answers: str
) -> LabelledRows:
    """The rows whose classes are the task's; records of one image file count once.

    Args:
      said: of all records of the source.
      matching: rows with a class in ``matching.unknown`` are left out and counted.
      class_names: of the task.
      several: whether an image may have any number of classes, instead of exactly one.
      answers: what becomes of a class without images, for the notes.

    Raises:
      ValueError: no row is left, or an image does not have exactly one class where it should; one line.
    """
    rows: list[int] = []
    classes: list[list[int]] = []
    place_of: dict[str, int] = {}
    left_out = repeated = 0
    for row, one in enumerate(said):
        numbers = [matching.number_of.get(label) for label in one.labels]
        if None in numbers:
            left_out += 1
            continue
        place = place_of.setdefault(one.image, len(rows)) if one.image else len(rows)
        if place < len(rows):
            repeated += 1
            classes[place] = list(dict.fromkeys(classes[place] + numbers))
        else:
            rows.append(row)
            classes.append(list(dict.fromkeys(numbers)))
    if not rows:
        raise ValueError(f"no image is of one of its {len(class_names):,} classes")
    if not several:
        _check_single(rows, classes, class_names)
    counts = np.bincount(np.concatenate(classes).astype(int), minlength=len(class_names))
    notes = _notes(matching, class_names, counts, answers)
    if left_out:
        unknown = _list(map(repr, matching.unknown[:NAMED]), matching.unknown)
        notes.append(
            f"left out: {left_out:,} of {len(said):,} records, of {len(matching.unknown):,} classes that are not the "
            f"task's: {unknown}"
        )
    if repeated:
        notes.append(f"{repeated:,} of {len(said):,} records name an image file again; each file counts once")
    without = sum(not numbers for numbers in classes)
    if without:
        notes.append(f"{without:,} of {len(rows):,} images have no class")
    return LabelledRows(rows, classes, notes)


def _check_single(rows: Sequence[int], classes: Sequence[list[int]], class_names: Sequence[str]) -> None:
    wrong = [place for place, numbers in enumerate(classes) if len(numbers) != 1]
    if wrong:
        names = [class_names[number] for number in classes[wrong[0]]]
        has = f"{len(names)} classes ({_list(map(repr, names[:NAMED]), names)})" if names else "no class"
        raise ValueError(
            f"{len(wrong):,} of its {len(rows):,} images do not have exactly one class; the first, record "
            f"{rows[wrong[0]]}, has {has}"
        )


def _notes(matching: Matching, class_names: Sequence[str], counts: np.ndarray, answers: str) -> list[str]:
    notes = []
    if matching.loosely:
        pairs = [f"{label!r} is {name!r}" for label, name in list(matching.loosely.items())[:NAMED]]
        notes.append(f"matched without case, spaces and punctuation: {_list(pairs, matching.loosely)}")
    absent = [class_names[number] for number in np.flatnonzero(counts == 0)]
    if absent:
        shown = _list(map(repr, absent[:NAMED]), absent)
        notes.append(f"{len(absent):,} of {len(class_names):,} classes have no image and {answers}: {shown}")
    return notes


def _list(shown: Iterable[str], everything: Sequence | dict) -> str:
    """The first :data:`NAMED` entries, and how many more there are."""
    more = len(everything) - NAMED
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")
