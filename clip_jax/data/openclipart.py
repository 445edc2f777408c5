"""Pairs of the Open Clip Art Library as Debian packages it: drawings in the public domain with titles and keywords.

    apt-get install openclipart-png openclipart-svg
    python -m clip_jax.prepare openclipart /usr/share/openclipart/png /usr/share/openclipart/svg OUTPUT [--part=train]

The pictures are the PNGs; what they show is in the RDF metadata of the SVGs of the same names, and in the folders.
"""

import hashlib
import pathlib
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from clip_jax.data.sources import Pair, PairError

SOURCE_NAME = "openclipart"
LICENCE = "public domain (Creative Commons Public Domain Dedication)"
DC, RDF = "{http://purl.org/dc/elements/1.1/}", "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
CC = "{http://web.resource.org/cc/}"

# Titles such as "gramastar" and "Lemon SVG theme" name the collection that a drawing came with.
MOST_WITH_ONE_TITLE = 8
MOST_WITH_ONE_NAME = 20  # the library has 1,375 stars that differ in the number of their points
AUTHORS_PREFIX = re.compile(r"^clipart by .* - ", re.IGNORECASE)
WORD = re.compile(r"[A-ZÀ-Þ]?[a-zà-ÿ]+|[A-ZÀ-Þ]+(?![a-zà-ÿ])")
EMPTY_KEYWORDS = {"hash", "unsorted", "special"}  # "hash" is what a script left there
PARTS = ("all", "train", "held_out")
ONE_NAME_HELD_OUT_OF = 10
SHORTEST_NAME = 3  # letters, of a drawing of a collection: "fc28" and "sm 13" are no words


class Metadata(NamedTuple):
    """What an SVG says of itself; texts are empty where it says nothing."""

    title: str
    keywords: list[str]
    creator: str
    licence: str


class Entry(NamedTuple):
    """A drawing by its path without the suffix: the captions, or why there are none (a reason and a line)."""

    path: str
    captions: list[str]
    problem: tuple[str, str] | None = None


def read_metadata(svg: pathlib.Path) -> Metadata:
    """The RDF metadata of an SVG.

    Raises:
      PairError: the file is missing or is no XML.
    """
    try:
        work = ElementTree.parse(svg).find(f".//{CC}Work")
    except (ElementTree.ParseError, OSError) as error:
        raise PairError(f"{svg}: {error}", "damaged_record") from None
    if work is None:
        return Metadata("", [], "", "")
    licence = work.find(f"{CC}license")
    return Metadata(
        _text(work.findtext(f"{DC}title")),
        [keyword for item in work.findall(f"{DC}subject/{RDF}Bag/{RDF}li") if (keyword := _text(item.text))],
        _text(work.findtext(f"{DC}creator/{CC}Agent/{DC}title")),
        "" if licence is None else licence.get(f"{RDF}resource", ""),
    )


def _text(value: str | None) -> str:
    return " ".join((value or "").replace("_", " ").split())


def name_of(metadata: Metadata, file_name: str, shared: bool) -> str:
    """What a drawing shows: its title, or the words of its file's name if others share the title; or nothing.

    Numbers, single letters and the creator's name tell drawings of a collection apart but say nothing of them.
    """
    title = AUTHORS_PREFIX.sub("", metadata.title)
    if not shared:
        return title
    creator = metadata.creator.lower().split()
    words = [word.lower() for word in WORD.findall(file_name) if len(word) > 1]
    words = [word for word in words if len(word) < 3 or not any(name.startswith(word) for name in creator)]
    names = (name for name in (" ".join(words), title) if sum(map(str.isalpha, name)) >= SHORTEST_NAME)
    return next(names, "")


def captions_of(name: str, keywords: Iterable[str], category: str) -> list[str]:
    """Sentences from a drawing's name, its keywords and its category; every caption has the name."""
    keywords = dict.fromkeys(keyword for keyword in keywords if keyword.lower() not in EMPTY_KEYWORDS)
    extra = [keyword for keyword in keywords if keyword.lower() not in name.lower()]
    captions = [name, f"clip art of {name}", f"a drawing of {name}"]
    captions += [f"{name}, {keyword}" for keyword in extra[:4]]
    if len(extra) > 1:
        captions.append(f"{name}. Keywords: {', '.join(extra[:6])}")
    if category not in EMPTY_KEYWORDS:
        captions.append(f"{name} ({category.replace('_', ' ')})")
    return list(dict.fromkeys(captions))


class OpenClipart:
    """The drawings of a part in the order of their paths; the key is the path, the label is the top folder.

    Of ``PARTS``, "held_out" has about a tenth of the names and "train" the others. Names that differ in digits and
    punctuation alone are one.

    A record that cannot be used is a PairError: ``no_title``, ``not_public_domain``, ``duplicate_picture`` (an earlier
    one has the same bytes), ``too_many_alike`` (more than 20 have its name), ``damaged_record``.

    Raises:
      FileNotFoundError: a folder is missing.
      ValueError: there is no PNG below the first, or no such part.
    """

    def __init__(self, png_folder: pathlib.Path, svg_folder: pathlib.Path, part: str = "all"):
        if part not in PARTS:
            raise ValueError(f"no part {part!r} of the clip art; there are {', '.join(PARTS)}")
        for folder in (png_folder, svg_folder):
            if not folder.is_dir():
                raise FileNotFoundError(f"no folder {folder}; see python -m clip_jax.prepare openclipart --help")
        self._folder = png_folder
        paths = sorted(path.relative_to(png_folder).with_suffix("").as_posix() for path in png_folder.rglob("*.png"))
        if not paths:
            raise ValueError(f"no .png below {png_folder}; see python -m clip_jax.prepare openclipart --help")
        entries, digest = _read_entries(paths, png_folder, svg_folder)
        self._entries = [entry for entry in entries if part in ("all", _part_of(entry))]
        self._fingerprint = digest if part == "all" else f"{digest} {part}"

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Pair:
        entry = self._entries[index]
        if entry.problem:
            reason, message = entry.problem
            raise PairError(f"{entry.path}: {message}", reason)
        return Pair(_png(self._folder, entry.path).read_bytes(), entry.captions, entry.path, _category(entry.path))

    def fingerprint(self) -> str:
        return self._fingerprint


def _png(folder: pathlib.Path, path: str) -> pathlib.Path:
    return folder / f"{path}.png"  # with_suffix would take the end of a name such as "beachball_v0.1"


def _category(path: str) -> str:
    return path.partition("/")[0].replace("_", " ")


def _part_of(entry: Entry) -> str:
    """By the letters of the name alone: drawings of one name are often much the same."""
    name = entry.captions[0] if entry.captions else entry.path
    letters = "".join(filter(str.isalpha, name.lower()))
    number = int.from_bytes(hashlib.sha256(letters.encode()).digest()[:8])
    return "train" if number % ONE_NAME_HELD_OUT_OF else "held_out"


def _read_entries(paths: list[str], pngs: pathlib.Path, svgs: pathlib.Path) -> tuple[list[Entry], str]:
    """An entry for each path, and a digest of them and of the pictures."""
    found: dict[str, Metadata | PairError] = {}
    for path in paths:
        try:
            found[path] = read_metadata(svgs / f"{path}.svg")
        except PairError as error:
            found[path] = error
    titles = Counter(metadata.title for metadata in found.values() if isinstance(metadata, Metadata))
    entries, pictures, names, whole = [], {}, Counter(), hashlib.sha256()
    for path, metadata in found.items():
        picture = hashlib.sha256(_png(pngs, path).read_bytes()).digest()
        captions, problem = [], None
        if isinstance(metadata, PairError):
            problem = (metadata.reason, str(metadata))
        elif "publicdomain" not in metadata.licence.lower():
            problem = ("not_public_domain", f"the licence is {metadata.licence or 'not given'}")
        elif picture in pictures:
            problem = ("duplicate_picture", f"the same bytes as {pictures[picture]}")
        else:
            shared = titles[metadata.title] > MOST_WITH_ONE_TITLE
            name = name_of(metadata, path.rpartition("/")[2], shared)
            if not name:
                problem = ("no_title", f"the title {metadata.title!r} says nothing of it")
            elif names[name.lower()] == MOST_WITH_ONE_NAME:
                problem = ("too_many_alike", f"{MOST_WITH_ONE_NAME} others are {name!r}")
            else:
                names[name.lower()] += 1
                pictures[picture] = path
                keywords = [keyword for keyword in metadata.keywords if keyword.lower() != metadata.creator.lower()]
                captions = captions_of(name, keywords, path.partition("/")[0])
        entries.append(Entry(path, captions, problem))
        whole.update(picture + repr(entries[-1]).encode())
    return entries, whole.hexdigest()[:16]
