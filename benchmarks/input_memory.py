"""Measures whether the input pipeline's memory grows: 200,000 examples from shards, with worker processes.

    python -m benchmarks.input_memory [--examples=200000] [--workers=2]

Prints the resident memory of the process and its workers after every tenth of the examples, and the growth from the
first tenth to the last. Memory that is shared with the page cache, such as the index, is not counted.
"""

import argparse
import io
import os
import pathlib
import sys
import tarfile
import tempfile

import numpy as np
from PIL import Image

from clip_jax.data.images import Augmentation
from clip_jax.data.pipeline import Batches, LoadPair, Transform, Workers
from clip_jax.data.sources import open_mixture

BATCH_SIZE = 200
SIDES = (40, 120)  # px; the images are resized to 32


def write_shards(folder: pathlib.Path, shards: int, pairs: int) -> str:
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:02d}.tar", "w") as tar:
            for pair in range(pairs):
                width, height = rng.integers(*SIDES, 2)
                stream = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(stream, "JPEG")
                for field, content in (("jpg", stream.getvalue()), ("txt", f"words {rng.integers(10**9)}".encode())):
                    entry = tarfile.TarInfo(f"{shard:02d}{pair:06d}.{field}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return f"wds:{folder}/{{00..{shards - 1:02d}}}.tar?index={folder}/index"


def descendants(process: int) -> list[int]:
    found = [process]
    for parent in found:
        for task in pathlib.Path(f"/proc/{parent}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def resident_bytes() -> int:
    total = 0
    for process in descendants(os.getpid()):
        status = pathlib.Path(f"/proc/{process}/status").read_text()
        total += 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mixture = open_mixture(write_shards(pathlib.Path(folder), shards=10, pairs=2_000))
        load_pair = LoadPair(mixture, Transform(32, 77, Augmentation()))
        batches = Batches(load_pair, BATCH_SIZE, seed=0, workers=Workers(arguments.workers))
        tenth, sizes = arguments.examples // 10 // BATCH_SIZE, []
        for _ in range(10):
            # The maximum over several batches, since the number of examples in progress varies.
            sizes.append(max(resident_bytes() for batch in range(tenth) if next(batches) and batch % 10 == 0))
            print(f"{len(sizes) * tenth * BATCH_SIZE:,} examples: {sizes[-1] / 1e6:.1f} MB", flush=True)
        batches.close()
    print(f"growth after the first tenth: {sizes[-1] / sizes[0] - 1:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
