"""Makes small shards for the tests of sources and of the pipeline."""

import io
import json
import pathlib
import tarfile

from PIL import Image

from clip_jax.data.sources import PairError


def image_bytes(number: int, size: int = 8, kind: str = "PNG") -> bytes:
    """Encodes an image whose color is a number below 65,536."""
    stream = io.BytesIO()
    Image.new("RGB", (size, size), (number % 256, number // 256, 7)).save(stream, kind)
    return stream.getvalue()


def write_tar(path: pathlib.Path, members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), 1_500_000_000.25
            tar.addfile(entry, io.BytesIO(content))


def pair_members(numbers: range) -> list[tuple[str, bytes]]:
    """Returns the members that img2dataset writes for each pair: image, caption and JSON."""
    members = []
    for number in numbers:
        texts = {"caption": f"told {number}", "alt": f"instead {number}", "label": f"class {number % 3}"}
        members += [
            (f"{number:06d}.png", image_bytes(number)),
            (f"{number:06d}.txt", f"number {number}".encode()),
            (f"{number:06d}.json", json.dumps(texts).encode()),
        ]
    return members


def write_shards(folder: pathlib.Path, shards: int, pairs: int) -> str:
    """Writes tars with so many pairs each. Returns the source's name."""
    for shard in range(shards):
        write_tar(folder / f"{shard:05d}.tar", pair_members(range(shard * pairs, (shard + 1) * pairs)))
    return f"wds:{folder}/{{00000..{shards - 1:05d}}}.tar"


def captions_or_reasons(source) -> list[list[str] | str]:
    """Returns the captions of each record, or the reason why it is bad."""
    found = []
    for index in range(len(source)):
        try:
            found.append(list(source[index].captions))
        except PairError as error:
            found.append(error.reason if "\n" not in str(error) else f"more than a line: {error}")
    return found
