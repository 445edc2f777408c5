"""Finds image files by file name, folder and pattern, for commands that take images as arguments."""

import glob
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

# A file with one of these endings should be an image. The first bytes of any other file decide.
ENDINGS = frozenset(
    f".{ending}"
    for line in (
        "jpg jpeg jpe jfif png apng webp gif bmp dib tif tiff avif heic heif ico jp2 j2k jpx",
        "ppm pgm pbm pnm tga psd svg",
    )
    for ending in line.split()
)


class ImageFiles(NamedTuple):
    """``paths`` to read, in order; ``problems``, one line each; ``skipped``, files that are not images."""

    paths: list[str]
    problems: list[str]
    skipped: list[str]


def find_image_files(names: list[str]) -> ImageFiles:
    """Returns the files that match names of files and folders and patterns. Reads at most their headers.

    A name that exists is used unchanged, whatever characters it has. Otherwise ``~`` is expanded, and ``*``, ``?``,
    ``[...]`` and ``**`` (any number of folders) make it a pattern. A folder means all files below it. Files of a
    folder or a pattern are sorted, and each is returned once. Hidden files, files that are not images and links
    to folders are listed in ``skipped``. A file that is named twice is returned twice.
    """
    result = ImageFiles([], [], [])
    seen: set[str] = set()

    def add_found(path: str) -> None:
        if (key := os.path.normpath(path)) not in seen:
            seen.add(key)
            (result.paths if _should_be_image(path) else result.skipped).append(path)

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
    """Yields all files below a folder, sorted. Yields hidden folders and links to folders, but does not enter them."""
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


def _should_be_image(path: str) -> bool:
    """Whether a file of a folder or a pattern should be read. If reading it then fails, that is an error."""
    name = os.path.basename(path)
    if name.startswith("."):
        return False
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe, a device, or a link to a folder
            return False
        if os.path.splitext(name)[1].lower() not in ENDINGS:
            Image.open(path).close()  # reads the header only
    except UnidentifiedImageError:
        return False
    except Exception:  # a broken link, no permission, a damaged header: reading the file reports it
        return True
    return True


def _behind_link(path: str, pattern: str) -> bool:
    """Whether ``**`` followed a link to a folder. Such a link can lead back to a folder above it."""
    if "**" not in pattern:
        return False
    folder, start = path, os.path.dirname(pattern[: pattern.index("**")])
    if not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    while len(folder) > len(start):
        if os.path.islink(folder):
            return True
        folder = os.path.dirname(folder)
    return False
