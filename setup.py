"""Metadata, dependencies and package data of clip_jax: the only place for them."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "clip_jax/__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name="clip-jax-tpu",  # "clip-jax" belongs to another project
    version=VERSION,
    description="Trains, checks, evaluates and uses CLIP models in JAX and Flax, on TPU pods and on a laptop",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["clip_jax", "clip_jax.*"]), "clip_jax.configs"],
    package_dir={"clip_jax.configs": "configs"},
    package_data={
        "clip_jax": ["py.typed"],
        "clip_jax.data": ["emoji/*.array_record", "emoji/*.json", "emoji/*.md", "emoji/LICENSE*", "vocabulary/*"],
        "clip_jax.evaluation": ["prompts/*.json", "published.json"],
    },
    entry_points={"console_scripts": ["clip-jax = clip_jax.__main__:start"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12",  # linen: the towers
        "optax>=0.2.8",  # AdamW and schedules
        "orbax-checkpoint>=0.12.8,<0.13",  # checkpoints; its interface changes between minor versions
        "xxhash>=3.6",  # digests of checkpoints: 28 GB/s on one core, where zlib's CRC-32 has 2 and SHA-256 1.5
        "grain>=0.2.18",  # the input pipeline; brings ArrayRecord
        "ml_collections>=1.1",  # the config tree
        "safetensors>=0.5",  # weights in and out
        "etils[epath]",  # the paths that orbax works with
        "numpy>=2",
        "pillow>=11",  # decoding of whatever is no plain JPEG, resizing for evaluation
        "simplejpeg>=1.9",  # libjpeg-turbo: the same pixels as Pillow's in less time
        # Bicubic resizing of a crop. Linux on ARM has no wheels, and does it with Pillow.
        "cykooz.resizer>=4; platform_system != 'Linux' or platform_machine != 'aarch64'",
        "msgpack",  # the records of ArrayRecord files
        "fsspec",  # buckets
        "braceexpand",  # {00000..00099} in the names of shards
        "ftfy>=6.3",  # part of CLIP's tokenizer
        "regex",  # the same: \p{L} and \p{N}, which re lacks
        "matplotlib",  # the report's pictures
        "tensorboardX",  # TensorBoard files without TensorFlow
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "tfds": ["tensorflow-datasets>=4.9.9"],  # reads what was prepared as ArrayRecord files, without TensorFlow
        "parquet": ["pyarrow"],
        "remote": ["s3fs", "gcsfs"],
        "wandb": ["wandb>=0.20"],  # config.logging.wandb_project
        "eval": ["scikit-learn>=1.7"],  # its digits, for a task of one second
        "test": [
            "pytest",
            "hypothesis",
            "pytest-timeout",
            "pytest-xdist",  # on several cores
            "tensorflow-datasets>=4.9.9",
            "importlib_resources",  # with which tensorflow-datasets prepares a data set
            "pyarrow",
            "s3fs",
            "moto[s3]",  # an S3 server on localhost
            "flask",  # its server
            "flask-cors",
            "scikit-learn>=1.7",
            "scipy",  # an optimum found in another way
            "playwright",  # opens the report in a Chromium, where there is one
        ],
        "dev": [
            "ruff",
            "resvg_py",  # renders the drawings in SVG when the shipped pairs are built
            "import-linter",  # imports point one way
            "wandb>=0.20",  # a test of its offline mode
        ],
        # What tests and benchmarks compare with. setuptools: clip-anytorch imports pkg_resources.
        "peers": [
            "torch==2.13.0",
            "open_clip_torch==3.3.0",
            "clip-anytorch==2.6.0",
            "transformers>=5",
            "clip-benchmark==1.6.2",
            "scikit-learn>=1.7",
            "setuptools<81",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
