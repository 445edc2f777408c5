"""Which fields of a record are its image, its captions and its class, as the options of a source's name say.

``image=url,image`` are tried in that order. Of ``caption=txt:3,json.alt:1`` each that a record has gives captions;
the numbers say how often one of that field is drawn. ``json.alt`` is the field of that name; where there is none, the
entry ``alt`` of the JSON in the field ``json``. Each ``template=a photo of a {}`` is filled in with every caption.
``clean=1`` cleans them (:func:`clean_caption`). With ``caption=`` and nothing after it a record's caption is its class,
named by ``label``.
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
LONGEST_CAPTION = 16_384  # characters: far more than any context length, and little enough for whatever reads it


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of one source; ``captions`` are names with their weights."""

    image: tuple[str, ...]
    captions: tuple[tuple[str, float], ...]
    label: str = ""
    templates: tuple[str, ...] = ()
    clean: bool = False

    def captions_of(self, get: Callable[[str], object], name: str) -> tuple[list[str], list[float]]:
        """All captions of a record, and how often each is drawn if the fields differ in that.

        Args:
          get: from a field's name to its value: a text, a list of texts, or None.
          name: of the record, for messages.

        Raises:
          PairError: there is none, or one that is no text.
        """
        captions, weights = [], []
        fields = self.captions or ((self.label, 1.0),)
        for field, weight in fields:
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
            weights += [weight / len(texts) for _ in texts]
        if not captions:
            wanted = ", ".join(field for field, _ in fields)
            raise PairError(f"{name} has no caption: {wanted} is missing or empty", "empty_caption")
        return captions, weights if len(fields) > 1 else []

    def label_of(self, get: Callable[[str], object]) -> str:
        """A record's class, or its classes, one a line; empty if it has none."""
        return "\n".join(str(value).strip() for value in _values(get(self.label))) if self.label else ""

    def names(self) -> list[str]:
        """All fields, as the options name them."""
        return [*self.image, *(field for field, _ in self.captions), *filter(None, [self.label])]


def _values(value: object) -> list:
    """A field's values: of a list those that are not null."""
    values = value if isinstance(value, list | tuple) else [value]
    return [value for value in values if value is not None]


def clean_caption(text: str) -> str:
    """Without HTML tags, entities, addresses and names of image files; blanks as single spaces."""
    words = html.unescape(TAG.sub(" ", html.unescape(text))).split()
    return " ".join(word for word in words if not _is_address(word.lower().strip("()[]<>\"',;:!?")))


def _is_address(word: str) -> bool:
    mail = "@" in word[1:] and "." in word.partition("@")[2]
    return mail or "://" in word or word.startswith("www.") or word.rstrip(".").endswith(IMAGE_SUFFIXES)


def split_options(where: str) -> tuple[str, str]:
    """The place and the options of ``place?name=value&...``; a ``?`` that is part of a pattern stays in the place."""
    place, mark, options = where.rpartition("?")
    return (place, options) if mark and "=" in options else (where, "")


def parse_fields(options: str, defaults: Fields, name: str, also: tuple[str, ...] = ()) -> tuple[Fields, dict]:
    """The fields that a source's options name, and those of its options that are listed in ``also``.

    Raises:
      ValueError: an option is unknown or its value cannot be.
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
        changes["captions"] = tuple(_weighted(part, name) for part in given.split(",")) if given else ()
    if "label" in values:
        changes["label"] = values["label"][0]
    if "template" in values:
        changes["templates"] = tuple(values["template"])
        wrong = [template for template in values["template"] if template.count("{}") != 1]
        if wrong:
            raise ValueError(f"{name}: the template {wrong[0]!r} must have one {{}}, the place of the caption")
    if "clean" in values:
        if values["clean"][0] not in ("0", "1"):
            raise ValueError(f"{name}: clean={values['clean'][0]} must be 0 or 1")
        changes["clean"] = values["clean"][0] == "1"
    fields = dataclasses.replace(defaults, **changes)
    if "caption" in values and not (fields.captions or fields.label):
        raise ValueError(f"{name}: without captions there must be classes: name their field with label=")
    return fields, {key: values[key][0] for key in also if key in values}


def _weighted(part: str, name: str) -> tuple[str, float]:
    field, colon, weight = part.partition(":")
    try:
        value = float(weight) if colon else 1.0
    except ValueError:
        value = math.nan
    if not (field and math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: caption={part} must be a field, or FIELD:WEIGHT with a weight above 0")
    return field, value


def nested(
    record: Mapping[str, object], name: str, read: Callable[[str, object], object] | None = None
) -> Callable[[str], object]:
    """A getter of a record's fields by name, and of the entries of JSON that they hold.

    A field of the whole name comes first, dots and all. Where there is none, ``a.b.c`` is the entry ``c`` in the JSON
    of the field ``a.b``, or the entry ``b.c``, or ``c`` of ``b``, in that of ``a``. Of a list of objects it is the
    entry of each. JSON is parsed once.

    Args:
      record: the fields' values; those that are dicts or lists already are not parsed.
      name: of the record, for messages.
      read: from a field's name and value to the value that is given; without it, that is the value itself.

    Returns:
      The getter: None for what the record lacks. It raises PairError if such a field holds no JSON.
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
    """The column that a field's name stands for: that of the whole name, else of the longest part before a dot."""
    return field if field in columns else next((outer for outer, _ in _splits(field) if outer in columns), None)


def entry_of(value: object, path: str) -> object:
    """The entry of parsed JSON at a path of keys with dots between; None if there is none."""
    if isinstance(value, list | tuple):
        found = [entry_of(item, path) for item in value]
        return [item for item in found if item is not None] or None
    if not isinstance(value, dict):
        return None
    if path in value:
        return value[path]
    return next((entry_of(value[outer], inner) for outer, inner in _splits(path) if outer in value), None)


def _splits(field: str) -> Iterator[tuple[str, str]]:
    """What is before and after each dot, from the last dot on."""
    place = field.rfind(".")
    while place >= 0:
        yield field[:place], field[place + 1 :]
        place = field.rfind(".", 0, place)


def column_notes(columns: Collection[str], fields: Fields, unit: str = "columns") -> list[str]:
    """Lines on columns that no option names, and on names that could mean a column or an entry of another's JSON."""
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
    """Names with commas between, the first ``most`` of them."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def count_files(notes: Mapping[str, int], files: int) -> list[str]:
    """Lines with the number of the files that each is about, where there are several."""
    return [f"{note} (in {count:,} of {files:,} files)" if files > 1 else note for note, count in notes.items()]
