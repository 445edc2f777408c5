"""Measures what digests cost when a checkpoint is saved and restored.

    python -m benchmarks.checkpoint [--models=ViT-L/14] [--rounds=5] [--folder=/tmp]

Saves and restores the state of a training (random parameters and Adam's moments) with digests and without, alternating
in the same run; medians are compared, of wall time and of CPU time. ``save`` is the whole save, to the last byte.
``held up`` is the call that starts it, during which no step can start; its CPU time is that of the calling thread.
``next step`` is a program that reads and replaces the state, started right after that call, while the save goes on.
``restore`` reads from the page cache if memory suffices. ``hash`` and ``compare`` are what digests add to a save and to
a restore, alone. ViT-L/14 needs 11 GB of memory and 5 GB of disk.
"""

import argparse
import contextlib
import gc
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from clip_jax import saved_arrays
from clip_jax.config import default_config
from clip_jax.digests import check_finite, digest
from clip_jax.sharding import make_mesh
from clip_jax.training.checkpoint import Checkpointer
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import TrainState, abstract_state, make_model

KINDS = ("without", "with")


def plain_handler() -> ocp.PyTreeCheckpointHandler:
    """Returns orbax's own handler, with the same options."""
    arrays = ocp.type_handlers.ArrayHandler(**saved_arrays.ARRAY_OPTIONS)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


@contextlib.contextmanager
def digests(kind: str) -> Iterator[None]:
    """Turns digests off within the block, or leaves them on."""
    handler = saved_arrays.handler
    saved_arrays.handler = handler if kind == "with" else plain_handler
    try:
        yield
    finally:
        saved_arrays.handler = handler


def random_state(template: TrainState) -> TrainState:
    """Returns a state with numbers that compress as badly as trained ones."""
    rng = np.random.default_rng(0)

    def make(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype != np.float32:
            return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        return jax.device_put(rng.standard_normal(leaf.shape, np.float32), leaf.sharding)

    return jax.tree.map(make, template)


def seconds(action: Callable[[], object], cpu_clock: Callable[[], float] = time.process_time) -> tuple[float, float]:
    """Returns wall time and CPU time."""
    started = time.perf_counter(), cpu_clock()
    action()
    return time.perf_counter() - started[0], cpu_clock() - started[1]


class Saved:
    """The state, which each step replaces, and the folder of its checkpoint."""

    def __init__(self, template: TrainState, folder: pathlib.Path):
        self.template, self.folder = template, folder
        self.state: TrainState | None = random_state(template)
        self.step = jax.jit(lambda state: jax.tree.map(lambda x: x + x.dtype.type(0), state), donate_argnums=0)

    def save(self, kind: str) -> dict[str, tuple[float, float]]:
        """Saves once, and returns seconds."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        with digests(kind):
            checkpointer = Checkpointer(epath.Path(self.folder), keep=1)
        times = {}

        def save() -> None:
            start = lambda: checkpointer.save(0, self.state, 0, "fingerprint")  # noqa: E731
            times["held up"] = seconds(start, time.thread_time)
            times["next step"] = seconds(self.take_step)
            checkpointer.wait()

        times["save"] = seconds(save)
        checkpointer.close()
        return times

    def take_step(self) -> None:
        self.state = jax.block_until_ready(self.step(self.state))

    def restore(self, kind: str) -> dict[str, tuple[float, float]]:
        """Restores once, and returns seconds. The last save must have been with digests."""
        self.state = None
        gc.collect()
        template = {name: leaf for name, leaf in self.template._asdict().items() if name != "batch_stats" or leaf}
        directory = epath.Path(self.folder) / "checkpoints" / "0" / "state"

        def restore() -> None:
            restored = jax.block_until_ready(saved_arrays.restore_like(directory, template))
            self.state = TrainState(**({"batch_stats": {}} | restored))

        with digests(kind):
            return {"restore": seconds(restore)}

    def hash(self) -> list[str]:
        """Hashes every array."""
        return [digest(np.asarray(array)) for array in jax.tree.leaves(self.state)]

    def compare(self) -> None:
        """Hashes every array, and looks for values that are not finite."""
        self.hash()
        check_finite("state", [np.asarray(array) for array in jax.tree.leaves(self.state)])


def measure(model: str, rounds: int, folder: pathlib.Path) -> None:
    config = default_config(model)
    mesh = make_mesh(1)
    template = abstract_state(make_model(config, mesh), make_optimizer(config.optimizer, 100), mesh)
    saved = Saved(template, folder)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(saved.state))
    saved.take_step()  # compiles
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for action in (saved.save, saved.restore):
        for number in range(rounds + 1):
            for kind in KINDS if number % 2 else KINDS[::-1]:
                for name, value in action(kind).items():
                    times.setdefault((name, kind), []).append(value)
        if not saved_arrays.has_digests(epath.Path(folder) / "checkpoints/0/state"):
            saved.save("with")  # restored with and without comparing them
    print(f"{model}: {size / 1e9:.2f} GB, {rounds} rounds")
    for name, action in (("hash", saved.hash), ("compare", saved.compare)):
        wall, cpu = min(seconds(action) for _ in range(rounds))
        print(f"  {name:9} alone {wall:.3f} s wall, {cpu:.3f} s CPU")
    for name in dict.fromkeys(name for name, _ in times):
        for number, clock in enumerate(("wall", "CPU")):
            # The first round warms up.
            plain, verified = ([one[number] for one in times[name, kind][1:]] for kind in KINDS)
            ratio = statistics.median(verified) / statistics.median(plain)
            print(f"  {name:9} {clock:4}  without {_spread(plain)}  with {_spread(verified)}  ratio {ratio:.3f}")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):7.3f} s ({min(values):.3f} to {max(values):.3f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="ViT-L/14", help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the checkpoints are written; a temporary folder if not given")
    arguments = parser.parse_args()
    for model in arguments.models.split(","):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            measure(model, arguments.rounds, pathlib.Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
