"""Reads the Open Clip Art Library as Debian packages it: drawings in the public domain with titles and keywords.

    apt-get install openclipart-png openclipart-svg
    python -m clip_jax.prepare openclipart /usr/share/openclipart/png /usr/share/openclipart/svg OUTPUT [--part=train]

The images are the PNGs. Captions come from the RDF metadata of the SVGs of the same names, and from folder names.
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
LICENSE = "public domain (Creative Commons Public Domain Dedication)"
DC, RDF = "{http://purl.org/dc/elements/1.1/}", "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
CC = "{http://web.resource.org/cc/}"

# Titles such as "gramastar" and "Lemon SVG theme" name the collection that a drawing came with.
MAX_PER_TITLE = 8
MAX_PER_NAME = 20  # the library has 1,375 stars that differ only in their number of points
AUTHORS_PREFIX = re.compile(r"^clipart by .* - ", re.IGNORECASE)
WORD = re.compile(r"[A-ZÀ-Þ]?[a-zà-ÿ]+|[A-ZÀ-Þ]+(?![a-zà-ÿ])")
EMPTY_KEYWORDS = {"hash", "unsorted", "special"}  # a script left "hash"
PARTS = ("all", "train", "held_out")
HELD_OUT_ONE_IN = 10
MIN_LETTERS = 3  # in the name of a drawing of a collection: "fc28" and "sm 13" are not words


class Metadata(NamedTuple):
    """The metadata of an SVG. What is missing is empty."""

    title: str
    keywords: list[str]
    creator: str
    license: str


class Entry(NamedTuple):
    """A drawing: its path without the suffix, and its captions or its problem (a reason and a message).

    The source's fingerprint is computed from this tuple: with another message it is another source.
    """

    path: str
    captions: list[str]
    problem: tuple[str, str] | None = None


def read_metadata(svg: pathlib.Path) -> Metadata:
    """Reads the RDF metadata of an SVG.

    Raises:
      PairError: the file is missing or is not XML.
    """
    try:
        work = ElementTree.parse(svg).find(f".//{CC}Work")
    except (ElementTree.ParseError, OSError) as error:
        raise PairError(f"{svg}: {error}", "damaged_record") from None
    if work is None:
        return Metadata("", [], "", "")
    license_element = work.find(f"{CC}license")
    return Metadata(
        _text(work.findtext(f"{DC}title")),
        [keyword for item in work.findall(f"{DC}subject/{RDF}Bag/{RDF}li") if (keyword := _text(item.text))],
        _text(work.findtext(f"{DC}creator/{CC}Agent/{DC}title")),
        "" if license_element is None else license_element.get(f"{RDF}resource", ""),
    )


def _text(value: str | None) -> str:
    return " ".join((value or "").replace("_", " ").split())


def name_of(metadata: Metadata, file_name: str, shared: bool) -> str:
    """Returns what a drawing shows: its title, or the words of its file name if many share the title; or nothing.

    Numbers, single letters and the creator's name distinguish drawings of a collection but do not describe them.
    """
    title = AUTHORS_PREFIX.sub("", metadata.title)
    if not shared:
        return title
    creator = metadata.creator.lower().split()
    words = [word.lower() for word in WORD.findall(file_name) if len(word) > 1]
    words = [word for word in words if len(word) < 3 or not any(name.startswith(word) for name in creator)]
    names = (name for name in (" ".join(words), title) if sum(map(str.isalpha, name)) >= MIN_LETTERS)
    return next(names, "")


def captions_of(name: str, keywords: Iterable[str], category: str) -> list[str]:
    """Returns captions made of a drawing's name, keywords and category. Every caption contains the name."""
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
    """The drawings of one part, sorted by path. The key is the path, the label is the top folder.

    Of ``PARTS``, "held_out" has about a tenth of the names and "train" the others. Names that differ only in digits
    and punctuation are the same name.

    Bad records raise PairError with one of the reasons ``no_title``, ``not_public_domain``, ``duplicate_image`` (an
    earlier image has the same bytes), ``too_many_alike`` (20 earlier ones have its name) and ``damaged_record``.

    Args:
      png_folder: folder of the images.
      svg_folder: folder of the SVGs with the metadata.
      part: one of ``PARTS``.

    Raises:
      FileNotFoundError: a folder is missing.
      ValueError: there is no PNG below ``png_folder``, or no such part.
    """

    def __init__(self, png_folder: pathlib.Path, svg_folder: pathlib.Path, part: str = "all"):
        if part not in PARTS:
            raise ValueError(f"no part {part!r} of the clip art; the parts are {', '.join(PARTS)}")
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
    return folder / f"{path}.png"  # with_suffix would cut the end of a name such as "beachball_v0.1"


def _category(path: str) -> str:
    return path.partition("/")[0].replace("_", " ")


def _part_of(entry: Entry) -> str:
    """Returns "train" or "held_out" by the letters of the name alone: drawings of one name are often alike."""
    name = entry.captions[0] if entry.captions else entry.path
    letters = "".join(filter(str.isalpha, name.lower()))
    number = int.from_bytes(hashlib.sha256(letters.encode()).digest()[:8])
    return "train" if number % HELD_OUT_ONE_IN else "held_out"


def _read_entries(paths: list[str], pngs: pathlib.Path, svgs: pathlib.Path) -> tuple[list[Entry], str]:
    """Returns an entry for each path, and a digest of all entries and images."""
    found: dict[str, Metadata | PairError] = {}
    for path in paths:
        try:
            found[path] = read_metadata(svgs / f"{path}.svg")
        except PairError as error:
            found[path] = error
    titles = Counter(metadata.title for metadata in found.values() if isinstance(metadata, Metadata))
    entries, images, names, digest = [], {}, Counter(), hashlib.sha256()
    for path, metadata in found.items():
        image = hashlib.sha256(_png(pngs, path).read_bytes()).digest()
        captions, problem = [], None
        if isinstance(metadata, PairError):
            problem = (metadata.reason, str(metadata))
        elif "publicdomain" not in metadata.license.lower():
            problem = ("not_public_domain", f"the license is {metadata.license or 'not given'}")
        elif image in images:
            problem = ("duplicate_image", f"the same bytes as {images[image]}")
        else:
            shared = titles[metadata.title] > MAX_PER_TITLE
            name = name_of(metadata, path.rpartition("/")[2], shared)
            if not name:
                problem = ("no_title", f"the title {metadata.title!r} says nothing of it")
            elif names[name.lower()] == MAX_PER_NAME:
                problem = ("too_many_alike", f"{MAX_PER_NAME} others are {name!r}")
            else:
                names[name.lower()] += 1
                images[image] = path
                keywords = [keyword for keyword in metadata.keywords if keyword.lower() != metadata.creator.lower()]
                captions = captions_of(name, keywords, path.partition("/")[0])
        entries.append(Entry(path, captions, problem))
        digest.update(image + repr(entries[-1]).encode())
    return entries, digest.hexdigest()[:16]
