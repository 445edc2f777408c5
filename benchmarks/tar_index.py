"""Measures indexing tars in place, opening a source of a billion pairs, and starting a training on ten million.

    python -m benchmarks.tar_index [--shards=100] [--rounds=3]

Writes shards of 10,000 members (image bytes of 20 to 30 kB, a caption and a JSON for each pair, 9 GB in total) to a
temporary folder. The peer is reading the bytes of the same files with the same number of threads, alternating in the
same run, with the files in the page cache. The ten million pairs are 1,000 hard links to one shard. The billion pairs
are an index file of zeros.
"""

import argparse
import concurrent.futures
import io
import json
import os
import pathlib
import pickle
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

import numpy as np
from PIL import Image

from clip_jax.data.sources import open_source
from clip_jax.data.sources.mapped_index import MappedIndex
from clip_jax.data.sources.webdataset import DEFAULT_FIELDS, WebDatasetSource

MEMBERS = 10_000
TINY = [
    "--config.global_batch_size=64",
    "--config.steps=1",
    "--config.log_every=1",
    "--config.data.num_workers=2",
    "--config.evaluation.tasks=",
]


def write_shard(path: pathlib.Path, pairs: int, image_bytes: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for pair in range(pairs):
            contents = {
                "jpg": rng.bytes(int(rng.integers(*image_bytes))),
                "txt": b"a caption of a few words, as they are",
                "json": json.dumps({"caption": "a caption", "url": "https://example.org/" + "x" * 60}).encode(),
            }
            for field, content in contents.items():
                entry = tarfile.TarInfo(f"{pair:09d}.{field}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def read_bytes(path: pathlib.Path) -> None:
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def seconds(action) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure_building(folder: pathlib.Path, shards: int, rounds: int) -> None:
    paths = [folder / f"{shard:05d}.tar" for shard in range(shards)]
    for seed, path in enumerate(paths):
        write_shard(path, MEMBERS // 3, (20_000, 30_000), seed)
    size = sum(path.stat().st_size for path in paths)
    reading, building = [], []
    for number in range(rounds + 1):
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            reading.append(seconds(lambda pool=pool: list(pool.map(read_bytes, paths))))
        name = f"wds:{folder}/{{00000..{shards - 1:05d}}}.tar?index={folder}/index{number}"
        building.append(seconds(lambda name=name: open_source(name)))
    read, build = statistics.median(reading[1:]), statistics.median(building[1:])  # the first fills the page cache
    print(f"{shards} shards of {MEMBERS:,} members, {size / 1e9:.1f} GB: index {build:.2f} s, reading {read:.2f} s")
    print(f"ratio: the index is built at {read / build:.2f} of the speed of reading the bytes")
    again = seconds(lambda: open_source(name))
    print(f"opened again: {again * 1e3:.0f} ms")


def private_bytes() -> int:
    """Returns the memory of this process, without what it shares with the page cache."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def measure_a_billion(folder: pathlib.Path) -> None:
    index = folder / "billion"
    index.mkdir()
    pairs, shards = 10**9, 100_000
    np.lib.format.open_memmap(index / "records.npy", "w+", np.uint64, (pairs,)).flush()  # zeros take no disk space
    np.save(index / "firsts.npy", np.arange(shards + 1, dtype=np.int64) * (pairs // shards))
    meta = {
        "arrays": ["records", "firsts"],
        "shards": [[f"/data/{shard:06d}.tar", 10**9, "0", pairs // shards, "0"] for shard in range(shards)],
    }
    (index / "meta.json").write_text(json.dumps(meta))
    before = private_bytes()
    source = WebDatasetSource.__new__(WebDatasetSource)
    source.__setstate__({"_fields": DEFAULT_FIELDS, "_index": MappedIndex(index)})
    copy = pickle.loads(pickle.dumps(source))
    print(
        f"a billion pairs, 100,000 shards: {(index / 'records.npy').stat().st_size / pairs:.1f} bytes a pair, mapped, "
        f"{(private_bytes() - before) / 2e6:.0f} MB private to a process, {len(pickle.dumps(source))} bytes to a worker"
    )
    assert len(copy) == pairs


def measure_the_start(folder: pathlib.Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(stream, "JPEG")
    first = folder / "0000.tar"
    with tarfile.open(first, "w") as tar:
        for pair in range(10_000):
            for field, content in (("jpg", stream.getvalue()), ("txt", b"some noise")):
                entry = tarfile.TarInfo(f"{pair:09d}.{field}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    for shard in range(1, 1_000):
        os.link(first, folder / f"{shard:04d}.tar")
    name = f"wds:{folder}/{{0000..0999}}.tar?index={folder}/index"
    build = seconds(lambda: open_source(name))
    command = [sys.executable, "-m", "clip_jax.main", "--config=configs/quickstart.py", f"--config.data.source={name}"]
    command += [*TINY, f"--workdir={folder}/run"]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        times = {}
        for line in process.stdout:
            for word in ("first batch", "step 1/1"):
                if line.startswith(word):
                    times[word] = time.perf_counter() - started
    print(
        f"ten million pairs: index built in {build:.0f} s; from the command to the first batch, with an existing index:"
    )
    print("  " + ", ".join(f"{word} {value:.1f} s" for word, value in times.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for measure in (
        lambda folder: measure_building(folder, arguments.shards, arguments.rounds),
        measure_a_billion,
        measure_the_start,
    ):
        with tempfile.TemporaryDirectory() as folder:
            measure(pathlib.Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
