"""What :mod:`test_documents` does with each fenced block of the documents: one entry a block."""

from typing import NamedTuple


class Run(NamedTuple):
    """A block that is executed as it stands; ``writes`` must be there afterwards, ``removes`` not before."""

    document: str
    start: str
    writes: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()
    files: dict[str, str] = {}  # noqa: RUF012 (never changed)


class Skip(NamedTuple):
    """A block that is not executed, with the reason."""

    document: str
    start: str
    reason: str


CLOUD = "needs a project in Google Cloud"
STAND_IN = f"{CLOUD}; tests/launch/test_tpu_pod.py runs launch/tpu_pod.sh against a stand-in for gcloud"

# ``start`` is how the block begins: as much of it as tells it from the document's other blocks. A block that is written
# anew needs a new entry only if its beginning changes.
BLOCKS = (
    Run(
        "README.md",
        "make quickstart",
        writes=("runs/quickstart/report/report.html", "runs/quickstart/checkpoints/2"),
        removes=("runs/quickstart",),
    ),
    Run("README.md", ".venv/bin/python -m clip_jax.predict"),
    Run("README.md", "pip install -e ."),
    Run("README.md", "python -m clip_jax.evaluate", writes=("evaluations/b32/report.html",)),
    Run("README.md", "python -m clip_jax.convert", writes=("vit_b32/config.json", "vit_l14_hf/model.safetensors")),
    Run("README.md", "import clip_jax"),
    Skip("docs/design.md", "import dataclasses", "tests/extending/test_adding_a_tower.py trains with it"),
    Run("docs/data.md", "python -m clip_jax.main --config=configs/vit_b32.py"),
    Run("docs/data.md", "python -m clip_jax.prepare inspect", writes=("pairs.html",)),
    Run("docs/data.md", "python -m clip_jax.prepare openclipart", writes=("data/openclipart/manifest.json",)),
    Skip(
        "docs/design.md",
        "import io",
        "a file of the package; tests/extending/test_adding_a_source_and_a_task.py executes it",
    ),
    Skip(
        "docs/design.md",
        'Task(\n    "square_colors"',
        "a line of the registry; tests/extending/test_adding_a_source_and_a_task.py executes it",
    ),
    Skip("docs/design.md", '"""The paper', "tests/extending/test_adding_a_loss.py trains with it"),
    Run("docs/evaluation.md", "python -m clip_jax.evaluate", writes=("evaluations/both/comparison.html",)),
    Skip("docs/pods.md", "pip install", "needs libtpu, which tests do without; tests/test_plan.py tries the command"),
    Run(
        "docs/quickstart.md",
        "python -m clip_jax.main --config=configs/quickstart.py --workdir=runs/without_twemoji",
        writes=("runs/without_twemoji/report/report.html",),
    ),
    Skip("docs/tpu.md", "gcloud auth login", CLOUD),
    Skip("docs/tpu.md", "gcloud compute tpus accelerator-types", CLOUD),
    Skip("docs/tpu.md", "gcloud storage buckets create", CLOUD),
    Skip("docs/tpu.md", "gcloud storage buckets add-iam-policy-binding", CLOUD),
    Skip("docs/tpu.md", "gcloud compute firewall-rules", CLOUD),
    Skip("docs/tpu.md", "pod=(", STAND_IN),
    Skip("docs/tpu.md", "launch/tpu_pod.sh create --name=try", STAND_IN),
    Skip("docs/tpu.md", "gcloud compute tpus tpu-vm ssh", CLOUD),
    Skip("docs/tpu.md", "until launch/tpu_pod.sh status", STAND_IN),
    Skip("docs/tpu.md", "LIBTPU_INIT_ARGS=", "needs libtpu, which tests do without"),
    Skip("docs/tpu.md", "gcloud container clusters create", CLOUD),
    Skip("docs/tpu.md", "FROM python", "needs Docker"),
    Skip("docs/tpu.md", "!git clone", "cells of a Colab notebook"),
    Run(
        "docs/training.md",
        "python -m clip_jax.main --config=configs/vit_b32.py",
        writes=("runs/b32/checkpoints/2",),
        removes=("runs/b32",),
    ),
    Run("docs/training.md", "python -m clip_jax.verify runs/b32"),
    Run("docs/training.md", "python launch/local_pod.py", writes=("runs/pod/checkpoints/10",)),
    Run(
        "docs/weights.md",
        "python -m clip_jax.convert",
        writes=("vit_b32_hf", "rn50_open_clip", "rn50.safetensors", "vit_b32.pt"),
        removes=("vit_b32",),
    ),
    Run(
        "docs/weights.md",
        "python -m clip_jax.main --config=configs/vit_l14_336.py",
        writes=("runs/vit_l14_336/checkpoints/2",),
    ),
    Skip("benchmarks/README.md", "python -m benchmarks.accelerator", "needs a GPU and hours"),
)
