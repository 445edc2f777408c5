"""Reads pairs from folders of images, each with a text file of captions or in a folder named by its class."""

import os
import pathlib
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence

from clip_jax.data.images import image_suffixes
from clip_jax.data.sources.fields import Fields, parse_fields, split_options
from clip_jax.data.sources.files import Stamp
from clip_jax.data.sources.tables import Row, TableSource, make_row, open_rows, read_text

LINE_END = re.compile("\r?\n")
TEXT = ".txt"


def open_folder(where: str) -> TableSource:
    """Opens the images below a folder, each with a text file of the same name that has one caption per line.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: there are no images, or none has a text file.
    """
    path, options = split_options(where)
    fields, others = parse_fields(options, Fields((), ()), f"folder:{where}", also=("index",))
    folder = _existing(path)
    files, skipped = _files_below(folder)
    images = _images(folder, files)
    # .txt sorts after .TXT and so replaces it
    by_stem = {os.path.splitext(name)[0]: name for name in sorted(files) if _suffix(name) == TEXT}
    texts = {name: by_stem.get(os.path.splitext(name)[0], "") for name in images}
    if not any(texts.values()):
        expected = folder / (os.path.splitext(images[0])[0] + TEXT)
        raise ValueError(f"{folder / images[0]} has no captions: write at least one line to {expected}")
    used = {*images, *texts.values()}

    def rows(_: Counter) -> Iterator[Row]:
        lines = Fields((), (("its .txt", 1.0),), "", fields.templates, fields.clean)
        for name in images:
            try:
                found = _captions(folder / texts[name]) if texts[name] else []
            except ValueError as error:
                yield Row(name, [], [], "", ("damaged_record", str(error)))
                continue
            yield make_row(name, str(folder / name), lines, lambda _, found=found: found)

    content = [[name, files[name].size, files.get(texts[name])] for name in images]
    sizes = [[name, files[name].size] for name in images]
    notes = _notes([name for name in files if name not in used], skipped)
    root = os.path.abspath(folder)
    return open_rows("folder", [content, repr(fields)], [(root, rows)], others.get("index", ""), sizes, notes)


def _captions(path: pathlib.Path) -> list[str]:
    """Returns the lines of a text file. Only a line feed ends a line; a carriage return before it is dropped."""
    text = read_text(str(path))
    if "\0" in text:
        raise ValueError(f"{path} holds a zero byte")
    return LINE_END.split(text)


def open_image_folder(where: str) -> TableSource:
    """Opens images in one folder per class, whose name is class and caption, as torchvision's ImageFolder.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it has no folders, or no images in them.
    """
    path, options = split_options(where)
    fields, others = parse_fields(options, Fields((), (), label="its folder"), f"image_folder:{where}", also=("index",))
    folder = _existing(path)
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise ValueError(f"{folder} has no folders; it must have one for each class, with images in it")
    files, skipped = {}, Counter()
    for name in classes:
        found, skipped_here = _files_below(folder / name)
        files |= {f"{name}/{path}": stamp for path, stamp in found.items()}
        skipped += skipped_here
    images = []
    for name in classes:
        images += sorted((path, name) for path in files if path.startswith(f"{name}/") and _is_image(path))
    if not images:
        raise ValueError(_no_images(folder, files))
    empty = set(classes) - {name for _, name in images}
    skipped |= Counter({f"folder {name} without an image": 1 for name in empty})
    used = {path for path, _ in images}
    unused = [path for path in files if path not in used]
    unused += [entry.name for entry in folder.iterdir() if not entry.is_dir()]

    def rows(_: Counter) -> Iterator[Row]:
        for path, name in images:
            yield make_row(path, str(folder / path), fields, lambda _, name=name: name)

    sizes = [[path, files[path].size] for path, _ in images]
    root = os.path.abspath(folder)
    content, notes = [sizes, repr(fields)], _notes(unused, skipped)
    return open_rows("image_folder", content, [(root, rows)], others.get("index", ""), sizes, notes)


def _existing(path: str) -> pathlib.Path:
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    return folder


def _files_below(folder: pathlib.Path) -> tuple[dict[str, Stamp], Counter]:
    """Returns the stamps of all files by their path below the folder, and the number of other entries by kind.

    Raises:
      OSError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    files, skipped = {}, Counter()
    for parent, folders, names in os.walk(folder, onerror=fail):
        skipped["link to a folder"] += sum(os.path.islink(os.path.join(parent, name)) for name in folders)
        for name in names:
            path = pathlib.Path(parent) / name
            try:
                details = os.stat(path)
            except FileNotFoundError:
                skipped["broken link"] += 1
                continue
            if stat.S_ISREG(details.st_mode):
                files[path.relative_to(folder).as_posix()] = Stamp(details.st_size, str(details.st_mtime_ns))
            else:
                skipped["pipe, socket or device"] += 1
    return files, +skipped


def _images(folder: pathlib.Path, files: dict[str, Stamp]) -> list[str]:
    images = sorted(filter(_is_image, files))
    if not images:
        raise ValueError(_no_images(folder, files))
    return images


def _no_images(folder: pathlib.Path, files: dict[str, Stamp]) -> str:
    found = "; ".join(_notes(list(files), Counter())).replace("not used: ", "only ") or "it is empty"
    return f"no images below {folder}, {found}; supported are .jpg, .png, .webp and all else that Pillow reads"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_image(name: str) -> bool:
    return _suffix(name) in image_suffixes()


def _notes(unused: Sequence[str], skipped: Counter) -> list[str]:
    """Returns a note such as ``not used: 12 files .heic, 1 file without a suffix, 2 x broken link``, if any."""
    endings = Counter(_suffix(name) or "without a suffix" for name in unused)
    parts = [f"{count:,} {'file' if count == 1 else 'files'} {ending}" for ending, count in endings.most_common()]
    parts += [f"{count:,} x {kind}" for kind, count in skipped.items()]
    return [f"not used: {', '.join(parts)}"] if parts else []
