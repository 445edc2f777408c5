"""Finds picture files: by their names, in folders, and by patterns."""

import glob
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

# What a file is called that should be a picture, whatever it holds. Any other file is looked into.
ENDINGS = frozenset(
    f".{ending}"
    for line in (
        "jpg jpeg jpe jfif png apng webp gif bmp dib tif tiff avif heic heif ico jp2 j2k jpx",
        "ppm pgm pbm pnm tga psd svg",
    )
    for ending in line.split()
)


class PictureFiles(NamedTuple):
    """``paths`` to read, in order; ``problems``, a line each; ``passed_over``, what else is in folders and patterns."""

    paths: list[str]
    problems: list[str]
    passed_over: list[str]


def find_picture_files(names: list[str]) -> PictureFiles:
    """The files that names of files, names of folders, and patterns stand for.

    A name that exists is taken as it is, whatever characters are in it. Otherwise ``~`` is expanded, and ``*``, ``?``,
    ``[...]`` and ``**`` (any number of folders) are a pattern. A folder stands for all files below it. Of a folder,
    hidden files and links to folders are passed over; of folders and patterns, whatever is no picture. Their files are
    sorted, and left out where they are there already; a file that is named twice is there twice.
    """
    result = PictureFiles([], [], [])
    seen: set[str] = set()

    def add_found(path: str) -> None:
        if (key := os.path.normpath(path)) not in seen:
            seen.add(key)
            (result.paths if _may_be_picture(path) else result.passed_over).append(path)

    for name in names:
        path = name if os.path.lexists(name) else os.path.expanduser(name)
        if os.path.isdir(path):
            below = list(_walk(path, result.problems))
            if not below:
                result.problems.append(f"{name}: no files in this folder")
            for file in below:
                add_found(file)
        elif os.path.lexists(path):
            seen.add(os.path.normpath(path))
            result.paths.append(path)
        elif not glob.has_magic(path):
            result.problems.append(f"{name}: no such file or folder")
        else:
            matches = [match for match in sorted(glob.glob(path, recursive=True)) if not _behind_link(match, path)]
            if not matches:
                result.problems.append(f"{name}: no files match this pattern")
            for match in matches:
                for file in _walk(match, result.problems) if os.path.isdir(match) else [match]:
                    add_found(file)
    return result


def _walk(folder: str, problems: list[str]) -> Iterator[str]:
    """Everything below a folder but the folders in it, sorted; hidden ones, and links to one, are not entered."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        problems.append(f"{error.filename}: {error.strerror}")
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from _walk(entry.path, problems)
        else:
            yield entry.path


def _may_be_picture(path: str) -> bool:
    """Whether a file that nobody named is to be read, so that it is a mistake if it cannot be."""
    name = os.path.basename(path)
    if name.startswith("."):
        return False
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe, a device, or a link to a folder
            return False
        if os.path.splitext(name)[1].lower() not in ENDINGS:
            Image.open(path).close()  # reads the first bytes alone
    except UnidentifiedImageError:
        return False
    except Exception:  # a link to nothing, no permission, a damaged header: reading it will tell
        return True
    return True


def _behind_link(path: str, pattern: str) -> bool:
    """Whether ``**`` entered a link to a folder, which may lead back to where it is."""
    if "**" not in pattern:
        return False
    folder, start = path, os.path.dirname(pattern[: pattern.index("**")])
    if not os.path.isdir(folder):  # a link to a file is a file
        folder = os.path.dirname(folder)
    while len(folder) > len(start):
        if os.path.islink(folder):
            return True
        folder = os.path.dirname(folder)
    return False
