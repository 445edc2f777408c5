"""Chooses which fields of a record are its image, captions and class, by the options in the source's name.

``image=png,jpg``: the first of these fields that a record has. ``caption=txt:3,json.alt:1``: captions come from all of
these fields that a record has, in these proportions. ``json.alt`` is the field of that name or, without one, the
entry ``alt`` of the JSON in the field ``json``. ``template=a photo of a {}``: every caption is put into every template.
``clean=1``: captions are cleaned (:func:`clean_caption`). ``caption=`` without a value: the class, which ``label``
names, is the caption.
"""

import dataclasses
import html
import json
import math
import re
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from clip_jax.data.sources.base import PairError

TAG = re.compile(r"<[^<>]{1,500}>")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".tif", ".tiff", ".bmp")
LONGEST_CAPTION = 16_384  # characters: far above any context length, and small enough for the tokenizer


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of one source. ``captions`` are names with their proportions.

    The fingerprints of sources contain the repr of this class: to rename it or a field makes older runs refuse to
    resume. So do other messages of its errors, which the index of a table stores.
    """

    image: tuple[str, ...]
    captions: tuple[tuple[str, float], ...]
    label: str = ""
    templates: tuple[str, ...] = ()
    clean: bool = False

    def captions_of(self, get: Callable[[str], object], name: str) -> tuple[list[str], list[float]]:
        """Returns all captions of a record, and their proportions if there are several fields.

        Args:
          get: from a field's name to its value: a text, a list of texts, or None.
          name: name of the record, for messages.

        Raises:
          PairError: there is no caption, or one that is not a text.
        """
        captions, proportions = [], []
        fields = self.captions or ((self.label, 1.0),)
        for field, proportion in fields:
            value = get(field) if self.captions else list(filter(None, self.label_of(get).split("\n")))
            texts = [value] if isinstance(value, str) else _values(value)
            for text in texts:
                if not isinstance(text, str):
                    raise PairError(f"{name}: {field} is {type(text).__name__}, not text", "damaged_record")
            texts = [text[:LONGEST_CAPTION] for text in texts]
            if self.clean:
                texts = [clean_caption(text) for text in texts]
            texts = [text.strip() for text in texts if text.strip()]
            if self.templates:
                texts = [template.replace("{}", text) for text in texts for template in self.templates]
            captions += texts
            proportions += [proportion / len(texts) for _ in texts]
        if not captions:
            wanted = ", ".join(field for field, _ in fields)
            raise PairError(f"{name} has no caption: {wanted} is missing or empty", "empty_caption")
        return captions, proportions if len(fields) > 1 else []

    def label_of(self, get: Callable[[str], object]) -> str:
        """Returns a record's classes, one per line; empty if it has none."""
        return "\n".join(str(value).strip() for value in _values(get(self.label))) if self.label else ""

    def names(self) -> list[str]:
        """Returns all fields as the options name them."""
        return [*self.image, *(field for field, _ in self.captions), *filter(None, [self.label])]


def _values(value: object) -> list:
    """Returns a field's values, without those that are null."""
    values = value if isinstance(value, list | tuple) else [value]
    return [value for value in values if value is not None]


def clean_caption(text: str) -> str:
    """Returns a caption without HTML tags, entities, addresses and names of image files, and with single spaces."""
    words = html.unescape(TAG.sub(" ", html.unescape(text))).split()
    return " ".join(word for word in words if not _is_address(word.lower().strip("()[]<>\"',;:!?")))


def _is_address(word: str) -> bool:
    mail = "@" in word[1:] and "." in word.partition("@")[2]
    return mail or "://" in word or word.startswith("www.") or word.rstrip(".").endswith(IMAGE_SUFFIXES)


def split_options(where: str) -> tuple[str, str]:
    """Splits ``path?name=value&...`` into path and options. A ``?`` without options after it is part of the path."""
    path, mark, options = where.rpartition("?")
    return (path, options) if mark and "=" in options else (where, "")


def parse_fields(options: str, defaults: Fields, name: str, also: tuple[str, ...] = ()) -> tuple[Fields, dict]:
    """Parses the options of a source.

    Args:
      options: ``name=value&...``.
      defaults: fields of options that are not given.
      name: the source's name, for messages.
      also: names of further options.

    Returns:
      The fields, and the values of the options in ``also`` that are given.

    Raises:
      ValueError: an option is unknown or its value is invalid.
    """
    known = ("image", "caption", "text", "label", "template", "clean", *also)
    values = urllib.parse.parse_qs(options, keep_blank_values=True)
    if "text" in values and "caption" in values:
        raise ValueError(f"{name}: text and caption are the same option")
    for option, given in values.items():
        if option not in known:
            raise ValueError(f"{name}: there is no option {option!r}, only {', '.join(known)}")
        if option != "template" and len(given) > 1:
            raise ValueError(f"{name}: the option {option} is given {len(given)} times")
    if "text" in values:
        values["caption"] = values["text"]
    changes: dict[str, object] = {}
    if "image" in values:
        changes["image"] = tuple(values["image"][0].split(","))
    if "caption" in values:
        given = values["caption"][0]
        changes["captions"] = tuple(_parse_proportion(part, name) for part in given.split(",")) if given else ()
    if "label" in values:
        changes["label"] = values["label"][0]
    if "template" in values:
        changes["templates"] = tuple(values["template"])
        wrong = [template for template in values["template"] if template.count("{}") != 1]
        if wrong:
            raise ValueError(f"{name}: the template {wrong[0]!r} must have one {{}}, where the caption goes")
    if "clean" in values:
        if values["clean"][0] not in ("0", "1"):
            raise ValueError(f"{name}: clean={values['clean'][0]} must be 0 or 1")
        changes["clean"] = values["clean"][0] == "1"
    fields = dataclasses.replace(defaults, **changes)
    if "caption" in values and not (fields.captions or fields.label):
        raise ValueError(f"{name}: caption= without a value needs classes: name their field with label=")
    return fields, {key: values[key][0] for key in also if key in values}


def _parse_proportion(part: str, name: str) -> tuple[str, float]:
    field, colon, number = part.partition(":")
    try:
        value = float(number) if colon else 1.0
    except ValueError:
        value = math.nan
    if not (field and math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: caption={part} must be a field, or FIELD:PROPORTION with a proportion above 0")
    return field, value


def nested(
    record: Mapping[str, object], name: str, read: Callable[[str, object], object] | None = None
) -> Callable[[str], object]:
    """Returns a getter of a record's fields by name, and of entries of the JSON in them.

    If there is a field of the whole name, including its dots, it is used. Otherwise ``a.b.c`` is the entry ``c`` in the
    JSON of the field ``a.b``, or the entry ``b.c``, or ``c`` of ``b``, in that of ``a``. In a list of objects it is the
    entry of each. JSON is parsed once.

    Args:
      record: the fields' values. Those that are dicts or lists are not parsed.
      name: name of the record, for messages.
      read: from a field's name and value to the value to return; by default the value itself.

    Returns:
      The getter: None for what the record lacks. It raises PairError if such a field is not JSON.
    """
    parsed: dict[str, object] = {}

    def value_of(field: str) -> object:
        if field in record:
            return read(field, record[field]) if read else record[field]
        column = column_of(record, field)
        if column is None:
            return None
        if column not in parsed:
            text = read(column, record[column]) if read else record[column]
            try:
                parsed[column] = text if text is None or isinstance(text, dict | list) else json.loads(text)
            except (ValueError, TypeError, RecursionError) as error:
                raise PairError(f"{name}: {column} is no JSON: {error}", "damaged_record") from None
        return entry_of(parsed[column], field[len(column) + 1 :])

    return value_of


def column_of(columns: Collection[str], field: str) -> str | None:
    """Returns the column of a field: that of its whole name, else of the longest part before a dot, else None."""
    return field if field in columns else next((outer for outer, _ in _splits(field) if outer in columns), None)


def entry_of(value: object, path: str) -> object:
    """Returns the entry of parsed JSON at a path of keys joined by dots, or None if a key is missing."""
    if isinstance(value, list | tuple):
        found = [entry_of(item, path) for item in value]
        return [item for item in found if item is not None] or None
    if not isinstance(value, dict):
        return None
    if path in value:
        return value[path]
    return next((entry_of(value[outer], inner) for outer, inner in _splits(path) if outer in value), None)


def _splits(field: str) -> Iterator[tuple[str, str]]:
    """Yields what is before and after each dot, starting with the last dot."""
    dot = field.rfind(".")
    while dot >= 0:
        yield field[:dot], field[dot + 1 :]
        dot = field.rfind(".", 0, dot)


def column_notes(columns: Collection[str], fields: Fields, unit: str = "columns") -> list[str]:
    """Returns lines about unused columns, and about names that could mean a column or an entry of another column."""
    used = {column_of(columns, field) for field in fields.names()}
    notes = [f"not used: {unit} {name_some([column for column in columns if column not in used])}"]
    if all(column in used for column in columns):
        notes = []
    for field in dict.fromkeys(fields.names()):
        outer = column_of(columns, field.rpartition(".")[0]) if "." in field and field in columns else None
        if outer:
            notes.append(f"{field} is the column of that name, not the entry {field[len(outer) + 1 :]} of {outer}")
    return notes


def name_some(names: Iterable[str], most: int = 20) -> str:
    """Returns the first ``most`` names, joined by commas."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def count_files(notes: Mapping[str, int], files: int) -> list[str]:
    """Returns each note with the number of files that it is about, if there are several files."""
    return [f"{note} (in {count:,} of {files:,} files)" if files > 1 else note for note, count in notes.items()]
