"""Matches the labels of a source with the classes of a task, by one rule that never guesses.

1. A label of the source is matched with the task's ``labels``, or with its class names if it has no ``labels``. Equal
   strings match. Otherwise strings match that are equal without case, spaces and punctuation; a note reports this.
2. If no label matches, all labels are whole numbers and no class name is a number, the labels are indices into the
   class names, from 0.
3. Two labels never match the same class, and one label never matches two classes.
4. A label that matches nothing is refused, or left out and counted; the caller chooses which.
"""

import difflib
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from clip_jax.evaluation.images import Annotation

NAMED = 3  # classes that a message lists by name


class Matching(NamedTuple):
    """The result of :func:`match_classes`.

    Attributes:
      index_of: the class index in ``[0, C)`` of each label that matches.
      unknown: the labels that match nothing.
      loosely: the labels that match only without case, spaces and punctuation, with the name that they match.
    """

    index_of: dict[str, int]
    unknown: list[str]
    loosely: dict[str, str]


class LabeledRows(NamedTuple):
    """The records of a source that are used: their indices, the class indices of each, and notes on the others."""

    rows: list[int]
    classes: list[list[int]]
    notes: list[str]


def check_names(class_names: Sequence[str], labels: Sequence[str]) -> None:
    """Raises ValueError if a name or label is empty, a label repeats, or the two lists differ in length."""
    for key, values in (("class_names", class_names), ("labels", labels)):
        empty = [index for index, value in enumerate(values) if not value.strip()]
        if empty:
            raise ValueError(f"{key} has an empty entry at index {empty[0]}; give every class a name")
    if labels and len(labels) != len(class_names):
        raise ValueError(f"{len(class_names)} class_names for {len(labels)} labels; give one label for each class name")
    twice = [label for label in labels if labels.count(label) > 1] if len(set(labels)) < len(labels) else []
    if twice:
        raise ValueError(f"the label {twice[0]!r} occurs twice; give each class its own label")


def match_classes(found: Iterable[str], class_names: Sequence[str], labels: Sequence[str] = ()) -> Matching:
    """Applies steps 1 to 3 of the rule at the top of this file.

    Args:
      found: the labels of the source, each once.
      class_names: the task's C names, checked by :func:`check_names`.
      labels: the source's names for these classes, in the same order; empty if it uses the class names.

    Raises:
      ValueError: a label matches two classes, two labels match one class, or an index is out of range; one line.
    """
    keys = labels or class_names
    exactly, without_marks = defaultdict(list), defaultdict(list)
    for index, key in enumerate(keys):
        exactly[key].append(index)
        without_marks[plain(key)].append(index)
    index_of, unknown, loosely = {}, [], {}
    for label in found:
        indices = exactly.get(label) or (without_marks.get(plain(label)) if plain(label) else None) or []
        if len(indices) > 1:
            same = " and ".join(repr(keys[index]) for index in indices[:2])
            raise ValueError(f"the class {label!r} could be {len(indices)} of the classes ({same}); give labels, too")
        if not indices:
            unknown.append(label)
            continue
        index_of[label] = indices[0]
        if label not in exactly:
            loosely[label] = keys[indices[0]]
    numbered = not labels and all(map(str.isdecimal, unknown)) and not any(map(str.isdecimal, class_names))
    if unknown and not index_of and numbered:
        index_of, unknown = _by_index(unknown, len(class_names)), []
    _check_one_to_one(index_of, keys)
    return Matching(index_of, unknown, loosely)


def plain(text: str) -> str:
    """Returns the text without case, spaces and punctuation: ``greatwhiteshark`` for ``Great_White-Shark``."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter for letter in folded if letter.isalnum() or unicodedata.category(letter).startswith("M"))


def _by_index(found: Sequence[str], count: int) -> dict[str, int]:
    highest = max(map(int, found))
    if highest >= count:
        raise ValueError(
            f"its labels go up to {highest}, which needs {highest + 1} class names, but there are {count}; indices "
            "start at 0"
        )
    return {label: int(label) for label in found}


def _check_one_to_one(index_of: dict[str, int], keys: Sequence[str]) -> None:
    first: dict[int, str] = {}
    for label, index in index_of.items():
        other = first.setdefault(index, label)
        if other != label:
            raise ValueError(
                f"its classes {other!r} and {label!r} would both be {keys[index]!r}; merge them or rename one"
            )


def no_match_message(unknown: Sequence[str], found: int, class_names: Sequence[str], labels: Sequence[str]) -> str:
    """Returns the error message for classes of the task's source that match nothing."""
    keys = list(labels or class_names)
    shown = []
    for label in unknown[:NAMED]:
        near = difflib.get_close_matches(label, keys, n=1)
        shown.append(repr(label) + (f" (did you mean {near[0]!r}?)" if near else ""))
    what = "labels" if labels and list(labels) != list(class_names) else "class names"
    return (
        f"{len(unknown):,} of its {found:,} classes match none of the task's {len(keys):,} {what}: "
        f"{_list(shown, unknown)}; correct the names, or give labels in the order of class_names"
    )


def choose_rows(
    annotations: Sequence[Annotation], matching: Matching, class_names: Sequence[str], several: bool, answers: str
) -> LabeledRows:
    """Returns the records whose classes are the task's. Records of one image file are one image.

    Args:
      annotations: of all records of the source.
      matching: records with a label in ``matching.unknown`` are left out and counted.
      class_names: of the task.
      several: whether an image may have any number of classes, instead of exactly one.
      answers: completes the note "... classes have no image and ...".

    Raises:
      ValueError: no record is left, or ``several`` is false and an image does not have exactly one class; one line.
    """
    rows: list[int] = []
    classes: list[list[int]] = []
    index_of: dict[str, int] = {}
    left_out = repeated = 0
    for row, annotation in enumerate(annotations):
        indices = [matching.index_of.get(label) for label in annotation.labels]
        if None in indices:
            left_out += 1
            continue
        image = index_of.setdefault(annotation.image, len(rows)) if annotation.image else len(rows)
        if image < len(rows):
            repeated += 1
            classes[image] = list(dict.fromkeys(classes[image] + indices))
        else:
            rows.append(row)
            classes.append(list(dict.fromkeys(indices)))
    if not rows:
        raise ValueError(f"no image has one of its {len(class_names):,} classes")
    if not several:
        _check_single(rows, classes, class_names)
    counts = np.bincount(np.concatenate(classes).astype(int), minlength=len(class_names))
    notes = _notes(matching, class_names, counts, answers)
    if left_out:
        unknown = _list(map(repr, matching.unknown[:NAMED]), matching.unknown)
        notes.append(
            f"left out: {left_out:,} of {len(annotations):,} records, of {len(matching.unknown):,} classes that are "
            f"not the task's: {unknown}"
        )
    if repeated:
        notes.append(f"{repeated:,} of {len(annotations):,} records name an image file again; each file counts once")
    without = sum(not indices for indices in classes)
    if without:
        notes.append(f"{without:,} of {len(rows):,} images have no class")
    return LabeledRows(rows, classes, notes)


def _check_single(rows: Sequence[int], classes: Sequence[list[int]], class_names: Sequence[str]) -> None:
    wrong = [image for image, indices in enumerate(classes) if len(indices) != 1]
    if wrong:
        names = [class_names[index] for index in classes[wrong[0]]]
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
    absent = [class_names[index] for index in np.flatnonzero(counts == 0)]
    if absent:
        shown = _list(map(repr, absent[:NAMED]), absent)
        notes.append(f"{len(absent):,} of {len(class_names):,} classes have no image and {answers}: {shown}")
    return notes


def _list(shown: Iterable[str], everything: Sequence | dict) -> str:
    """Returns the ``shown`` entries, and how many more there are."""
    more = len(everything) - NAMED
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")
