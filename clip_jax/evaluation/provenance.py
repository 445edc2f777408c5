"""Records how results were made: the date, command, code version and devices."""

import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
from collections import Counter
from collections.abc import Sequence

import jax

import clip_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow")
ACCELERATORS = {"tpu": "libtpu", "gpu": "jax-cuda13-plugin"}  # the package that compiles for these devices
ROOT = pathlib.Path(clip_jax.__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Facts about how results were made. A fact that does not apply is an empty string.

    Attributes:
      date: UTC, to the minute.
      command: as typed, with ``python`` instead of its path.
      devices: number and kind, and the number of hosts.
      versions: of clip_jax, Python, JAX and other packages that the numbers depend on.
      commit: of the git checkout that clip_jax was imported from, with a remark if files were changed.
      model: as given to the command.
      steps: number of training steps.
      training_time, evaluation_time: text such as ``6m02s``.
      config: the run's config as JSON, or the description of a model that was not trained here.
    """

    date: str
    command: str
    devices: str
    versions: str
    commit: str
    model: str = ""
    steps: str = ""
    training_time: str = ""
    evaluation_time: str = ""
    config: str = ""

    def facts(self) -> dict[str, str]:
        """Returns the facts that are known, except the config, by the name that the report shows."""
        named = {
            "Date": self.date,
            "Command": self.command,
            "Model": self.model,
            "Steps": self.steps,
            "Training time": self.training_time,
            "Evaluation time": self.evaluation_time,
            "Devices": self.devices,
            "Versions": self.versions,
            "Commit": self.commit,
        }
        return {name: value for name, value in named.items() if value}


def provenance(module: str, arguments: Sequence[str], **others: str) -> Provenance:
    """Returns the provenance of results that this process computed.

    Args:
      module: the module of the command, such as ``clip_jax.evaluate``.
      arguments: the arguments of the command.
      **others: other attributes of :class:`Provenance`.
    """
    now = datetime.datetime.now(datetime.UTC)
    command = shlex.join(["python", "-m", module, *arguments])
    return Provenance(f"{now:%Y-%m-%d %H:%M} UTC", command, _devices(), _versions(), commit_of(ROOT), **others)


def _devices() -> str:
    kinds = Counter(device.device_kind for device in jax.devices())
    parts = [f"{count:,} x {kind}" for kind, count in kinds.items()]
    if jax.default_backend() == "cpu":
        parts.append(f"{os.cpu_count()} cores of {platform.machine()}")
    hosts = jax.process_count()
    return ", ".join(parts) + (f", on {hosts:,} hosts" if hosts > 1 else "")


def _versions() -> str:
    accelerator = ACCELERATORS.get(jax.default_backend())
    names = [*PACKAGES, *([accelerator] if accelerator else [])]
    found = [f"{name} {_version(name)}" for name in names if _version(name)]
    return ", ".join([f"clip_jax {clip_jax.__version__}", f"Python {platform.python_version()}", *found])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit_of(root: pathlib.Path) -> str:
    """Returns the commit of the git checkout with ``root/clip_jax``; empty without git or a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        # An installed package may be inside the checkout of another project, which does not track it.
        git("ls-files", "--error-unmatch", "clip_jax/__init__.py")
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + (", with changes that are not committed" if changed else "")
