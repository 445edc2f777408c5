"""Opens data sets of images with captions. An open data set is a source: ``source[i]`` is an image and its captions.

A source is one string, ``kind:where?option=value&...``; several are joined by `` + ``:

==========================================  ========================================================================
``wds:/data/{00000..00099}.tar``            shards of WebDataset or img2dataset, read in place
``array_record:/data/pairs-*``              ArrayRecord files of msgpack maps with ``image`` (bytes) and ``captions``,
                                            and, if wanted, ``key`` and ``label``: as ``clip_jax.prepare`` writes
``tfds:coco_captions/train``                TensorFlow Datasets, prepared as ArrayRecord files
``parquet:/data/*.parquet``                 Parquet files with the images' bytes, as Hugging Face writes them
``csv:/pairs.csv``, ``tsv:``, ``jsonl:``    a table of paths, relative to its file, and captions
``folder:/images``                          images, each with a ``.txt`` of the same name, one caption per line
``image_folder:/images``                    images in one folder per class, whose name is the caption
``karpathy:/dataset.json?split=test``       Karpathy's annotations of COCO or Flickr30k; ``images=FOLDER`` of the images
``emoji:noto,twemoji/train``                the pairs in this package: styles (noto, twemoji, openmoji, fluent_flat,
                                            fluent_color, emojione, fxemoji, noto_v1), then a split (train,
                                            held_out, or all); ``?label=group``: the class is Unicode's group
``digits:test``                             scikit-learn's handwritten digits (train, test)
==========================================  ========================================================================

Options: ``image``, ``caption`` (or ``text``), ``label``, ``template``, ``clean`` (:mod:`clip_jax.data.sources.fields`);
``index=FOLDER`` for the index of tars and tables; ``skip=FILE`` for a list of shards of which nothing is used;
``data_dir`` of TensorFlow Datasets.
"""

from clip_jax.data.sources.array_record import EMOJI_FOLDER, ArrayRecordSource, open_array_record, open_emoji
from clip_jax.data.sources.base import MissingPackageError, Pair, PairError, ShardError, Source
from clip_jax.data.sources.digits import DigitsSource
from clip_jax.data.sources.folders import open_folder, open_image_folder
from clip_jax.data.sources.mixture import Mixture
from clip_jax.data.sources.parquet import open_parquet
from clip_jax.data.sources.tables import open_karpathy, open_table
from clip_jax.data.sources.tfds import open_tfds
from clip_jax.data.sources.webdataset import open_webdataset

__all__ = [
    "EMOJI_FOLDER",
    "ArrayRecordSource",
    "MissingPackageError",
    "Mixture",
    "Pair",
    "PairError",
    "ShardError",
    "Source",
    "open_mixture",
    "open_source",
    "source_names",
]

OPENERS = {
    "wds": open_webdataset,
    "array_record": open_array_record,
    "tfds": open_tfds,
    "parquet": open_parquet,
    "csv": lambda where: open_table("csv", where),
    "tsv": lambda where: open_table("tsv", where),
    "jsonl": lambda where: open_table("jsonl", where),
    "folder": open_folder,
    "image_folder": open_image_folder,
    "karpathy": open_karpathy,
    "emoji": open_emoji,
    "digits": DigitsSource,
}
JOIN = " + "


def open_source(name: str) -> Source:
    """Opens the source that a string names, or several one after the other (see the module's documentation).

    Raises:
      FileNotFoundError: a file or folder is missing.
      ValueError: the string is wrong, or a file is not in the expected format.
    """
    mixture = open_mixture(name)
    return mixture.sources[0] if len(mixture.sources) == 1 else mixture


def open_mixture(name: str, proportions: str = "") -> Mixture:
    """Opens sources to draw from them in ``proportions`` such as ``3:1``, or every pair equally often by default.

    Raises:
      FileNotFoundError: as :func:`open_source`.
      ValueError: as :func:`open_source`, or the proportions are wrong.
    """
    names = source_names(name)
    return Mixture(names, [_open_one(part) for part in names], proportions)


def source_names(name: str) -> list[str]:
    """Returns the names of the sources that a string joins."""
    return [part.strip() for part in name.split(JOIN)]


def _open_one(name: str) -> Source:
    kind, _, where = name.partition(":")
    if kind not in OPENERS or not where:
        raise ValueError(f"{name!r} is not a source: write {', '.join(f'{kind}:...' for kind in OPENERS)}")
    return OPENERS[kind](where)
