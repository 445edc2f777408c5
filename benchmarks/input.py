"""Measures training images per CPU second, from WebDataset shards to batches: clip_jax, open_clip and tf.data.

pip install -e ".[peers]" webdataset==0.2.86 pandas tensorflow
python -m benchmarks.input [--rounds=5] [--images=1024] [--only=clip_jax]

The data is two sets of synthetic photographs with captions: 256 by 256 pixels, as img2dataset writes them, and 640 by
480. All three make squares of 224 pixels by the same transform: resize the short side (bicubic, antialiased), crop at
random.

- clip_jax: ``wds:`` into ``Batches``, uint8 images and tokens.
- open_clip: its own ``get_wds_dataset`` and tokenizer, with Resize and RandomCrop of torchvision in place of its
  RandomResizedCrop; normalized float32 images, as it trains on.
- tf.data: the same images as TFRecords, only the crop decoded and resized; uint8 images, captions unchanged.

Each runs in its own process without worker processes, and they take turns. The figure is the user and system time of
all threads. A measurement starts and ends when the read-ahead is full, so that reading ahead is counted once. Prints
the median over rounds and the ratio to each peer.
"""

import argparse
import importlib
import io
import multiprocessing
import pathlib
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.missing import has_peer
from benchmarks.tokenizer import caption_stream

IMAGE_SIZE, CONTEXT_LENGTH, BATCH_SIZE = 224, 77, 128
SIZES = ((256, 256), (640, 480))
SHARDS, PAIRS_IN_SHARD = 4, 128
LINKED_SHARDS = 128  # links to these, since shuffling a few hundred indices costs more per index
QUALITY = 90
FIELD_SIDE = 2048  # of the landscape that all photographs are cut from
STILL_SECONDS = 0.3  # without CPU work; then the read-ahead is full


def landscape(rng: np.random.Generator) -> np.ndarray:
    """Returns uint8 RGB noise with the power spectrum of a photograph, and shapes with hard edges."""
    frequency = np.hypot(np.fft.fftfreq(FIELD_SIDE)[:, None], np.fft.rfftfreq(FIELD_SIDE)) * FIELD_SIDE
    frequency[0, 0] = np.inf
    spectrum = (rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))) / frequency**1.4
    channels = np.fft.irfft2(spectrum)
    light, red, blue = channels / channels.std(axis=(1, 2), keepdims=True)
    pixels = 120 + 50 * light[..., None] + 15 * np.stack((red, -red - blue, blue), axis=-1)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for x, y in rng.random((150, 2)) * FIELD_SIDE:
        draw.circle((x, y), rng.uniform(4, 60), tuple(rng.integers(256, size=3).tolist()))
    return np.asarray(image)


def write_shards(folder: pathlib.Path, width: int, height: int) -> float:
    """Writes the tars of one size; returns the mean size of a JPEG in bytes."""
    rng, captions = np.random.default_rng(width), caption_stream(seed=0, unusual=0.05)
    field, total = landscape(rng), 0
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for number in range(PAIRS_IN_SHARD):
                left, top = rng.integers(FIELD_SIDE - width), rng.integers(FIELD_SIDE - height)
                part = field[top : top + height, left : left + width]
                pixels = (part + rng.normal(size=part.shape) * 2).clip(0, 255).astype(np.uint8)  # a sensor's noise
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "JPEG", quality=QUALITY)
                total += len(stream.getvalue())
                for suffix, content in (("jpg", stream.getvalue()), ("txt", next(captions).encode())):
                    member = tarfile.TarInfo(f"{shard:05}{number:04}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    for shard in range(SHARDS, LINKED_SHARDS):
        (folder / f"{shard:05}.tar").symlink_to(f"{shard % SHARDS:05}.tar")
    return total / SHARDS / PAIRS_IN_SHARD


def shard_pattern(folder: pathlib.Path) -> str:
    return f"{folder}/{{{0:05}..{LINKED_SHARDS - 1:05}}}.tar"


def our_batches(folder: pathlib.Path) -> Iterator:
    from clip_jax.data.images import Augmentation
    from clip_jax.data.pipeline import Batches, LoadPair, Transform
    from clip_jax.data.sources import open_mixture

    mixture = open_mixture(f"wds:{shard_pattern(folder)}?index={folder}")
    return Batches(LoadPair(mixture, Transform(IMAGE_SIZE, CONTEXT_LENGTH, Augmentation())), BATCH_SIZE, seed=0)


def open_clip_batches(folder: pathlib.Path) -> Iterator:
    importlib.import_module("benchmarks.peers")  # must come first
    import open_clip
    import torch
    from open_clip_train.data import get_wds_dataset
    from torchvision import transforms

    torch.set_num_threads(1)
    transform = transforms.Compose(
        [
            transforms.Resize(IMAGE_SIZE, transforms.InterpolationMode.BICUBIC),
            transforms.RandomCrop(IMAGE_SIZE),
            transforms.ToTensor(),
            transforms.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
        ]
    )
    arguments = argparse.Namespace(
        train_data=shard_pattern(folder),
        train_num_samples=10**9,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=BATCH_SIZE,
        workers=0,
        world_size=1,
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return iter(get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer).dataloader)


def tf_data_batches(folder: pathlib.Path) -> Iterator:
    import tensorflow as tf

    records = str(folder / "pairs.tfrecord")
    with tf.io.TFRecordWriter(records) as writer:
        for shard in range(SHARDS):
            with tarfile.open(folder / f"{shard:05}.tar") as tar:
                members = tar.getmembers()
                for pair in zip(members[::2], members[1::2], strict=True):
                    image, text = (tar.extractfile(member).read() for member in pair)
                    feature = {
                        name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
                        for name, value in (("image", image), ("text", text))
                    }
                    writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())

    def load(record):
        fields = {name: tf.io.FixedLenFeature([], tf.string) for name in ("image", "text")}
        example = tf.io.parse_single_example(record, fields)
        height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(example["image"]))
        side = tf.minimum(height, width)
        top = tf.random.uniform([], maxval=height - side + 1, dtype=tf.int32)
        left = tf.random.uniform([], maxval=width - side + 1, dtype=tf.int32)
        image = tf.io.decode_and_crop_jpeg(example["image"], tf.stack([top, left, side, side]), channels=3)
        image = tf.image.resize(image, (IMAGE_SIZE, IMAGE_SIZE), "bicubic", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8), example["text"]

    pairs = tf.data.TFRecordDataset(records).shuffle(SHARDS * PAIRS_IN_SHARD).repeat()
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    return iter(pairs.map(load, num_parallel_calls=2).batch(BATCH_SIZE).prefetch(2).with_options(options))


INSTALL = 'pip install -e ".[peers]" webdataset==0.2.86 pandas tensorflow'
MODULES = {
    "clip_jax": "",
    "open_clip": "torch torchvision open_clip open_clip_train webdataset pandas",
    "tf.data": "tensorflow",
}
MAKERS = {"clip_jax": our_batches, "open_clip": open_clip_batches, "tf.data": tf_data_batches}


def cpu_seconds_when_still() -> float:
    """Waits until this process stops using CPU time; returns its user and system time."""
    before, now = -1.0, time.process_time()
    while now - before > STILL_SECONDS / 20:
        time.sleep(STILL_SECONDS)
        before, now = now, time.process_time()
    return now


def serve(connection: Connection, name: str, folder: pathlib.Path) -> None:
    """Runs in its own process: receives a number of batches, reads them, and sends the CPU seconds; 0 ends it."""
    batches = MAKERS[name](folder)
    while count := connection.recv():
        start = cpu_seconds_when_still()
        for _ in range(count):
            next(batches)
        connection.send(cpu_seconds_when_still() - start)


def measure(names: list[str], folder: pathlib.Path, rounds: int, images: int) -> dict[str, float]:
    """Returns images per CPU second of each implementation, the median over rounds."""
    context = multiprocessing.get_context("spawn")
    connections, processes, speeds = {}, [], {name: [] for name in names}
    for name in names:
        connections[name], theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, folder), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
    batches = -(-images // BATCH_SIZE)
    for turn in range(rounds + 1):
        for name in names:
            connections[name].send(batches)
            seconds = connections[name].recv()
            if turn:  # the first warms up
                speeds[name].append(batches * BATCH_SIZE / seconds)
    for name, process in zip(names, processes, strict=True):
        connections[name].send(0)
        process.join()
    return {name: statistics.median(values) for name, values in speeds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1024, help="in each round, of each implementation")
    parser.add_argument("--only", choices=MAKERS, help="measure only this implementation")
    arguments = parser.parse_args()
    wanted = [arguments.only] if arguments.only else list(MAKERS)
    names = [name for name in wanted if has_peer(name, MODULES[name], INSTALL)]
    if not names:
        return 2
    for width, height in SIZES:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            size = write_shards(folder, width, height)
            speeds = measure(names, folder, arguments.rounds, arguments.images)
        print(f"{width} x {height} pixels, JPEGs of {size / 1000:.0f} kB, to {IMAGE_SIZE} pixels")
        for name in names:
            ratio = "" if name == "clip_jax" else f"  clip_jax is {speeds['clip_jax'] / speeds[name]:.2f} times as fast"
            print(f"  {name:10} {speeds[name]:6.0f} images per CPU second{ratio if not arguments.only else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
