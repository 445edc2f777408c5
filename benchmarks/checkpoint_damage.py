"""Damages the checkpoints of a small model in many ways, and checks that no wrong value is ever restored.

    python -m benchmarks.checkpoint_damage [--flips=500] [--others=100] [--seed=0]

Each trial damages one file of the newer of two checkpoints and restores. Every restored value must be the saved one,
bit for bit: of the newer checkpoint, or of the older one after a warning. Half of the flips choose a byte of the whole
checkpoint, the other half a file and then a byte. The other kinds of damage are in ``KINDS``. The parameters alone are
restored as well, as evaluation does. Exit code 1 if a wrong value was restored.
"""

import argparse
import collections
import logging
import pathlib
import random
import shutil
import sys
import tempfile
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax.command_line import set_up_logging
from clip_jax.config import default_config
from clip_jax.run_folder import restore_variables, saved_fingerprint
from clip_jax.sharding import make_mesh
from clip_jax.training.checkpoint import Checkpointer
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import TrainState, abstract_state, make_model

STEPS, BATCH_SIZE, FINGERPRINT = (10, 20), 16, "the-data"


def small_template(mesh: Mesh) -> TrainState:
    """Returns shapes, dtypes and shardings of a small model's state."""
    config = default_config("ViT-tiny")
    config.model.embed_dim = 16
    config.model.vision.update(image_size=16, patch_size=8, width=32, num_layers=2, num_heads=2)
    config.model.text.update(width=24, num_layers=2, num_heads=2, context_length=8, vocab_size=64)
    return abstract_state(make_model(config, mesh), make_optimizer(config.optimizer, 100), mesh)


def random_state(template: TrainState, step: int) -> TrainState:
    """Returns a state with random numbers, at this step."""
    rng = np.random.default_rng(step)

    def make(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        array = rng.normal(size=leaf.shape) if leaf.dtype == np.float32 else np.full(leaf.shape, step)
        return jax.device_put(array.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(make, template)


def save_both(run: pathlib.Path, template: TrainState) -> dict[int, TrainState]:
    """Writes two checkpoints, and returns the states of both by their step."""
    states = {step: random_state(template, step) for step in STEPS}
    checkpointer = open_run(run)
    for step, state in states.items():
        checkpointer.save(step, state, step * BATCH_SIZE, FINGERPRINT)
        checkpointer.wait()
    checkpointer.close()
    return jax.tree.map(np.asarray, states)


def open_run(run: pathlib.Path) -> Checkpointer:
    """Returns the checkpoints of the run, as a training opens them."""
    return Checkpointer(run, 9, lambda step: step * BATCH_SIZE)


def flip(file: pathlib.Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(file: pathlib.Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def delete(file: pathlib.Path, rng: random.Random) -> None:
    file.unlink()


def zero(file: pathlib.Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    length = min(len(content) - start, rng.choice((1, 16, 512, 4096)))
    content[start : start + length] = bytes(length)
    file.write_bytes(content)


def append(file: pathlib.Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.choice((1, 100, 5000))))


def take_older(file: pathlib.Path, rng: random.Random) -> None:
    """Replaces a file by that of the same name in the older checkpoint, or else by the one nearest in size."""
    newer = next(parent for parent in file.parents if parent.name == str(STEPS[1]))
    older = newer.with_name(str(STEPS[0]))
    same = older / file.relative_to(newer)
    size = file.stat().st_size
    others = [other for other in older.rglob("*") if other.is_file() and other.parent.name == file.parent.name]
    shutil.copyfile(same if same.is_file() else min(others, key=lambda one: abs(one.stat().st_size - size)), file)


KINDS: dict[str, Callable[[pathlib.Path, random.Random], None]] = {
    "flip": flip,
    "truncate": truncate,
    "delete": delete,
    "zero": zero,
    "append": append,
    "take_older": take_older,
}


def choose_file(checkpoint: pathlib.Path, rng: random.Random, by_bytes: bool) -> pathlib.Path:
    """Returns a file that is not empty: each byte, or each file, is equally likely."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.stat().st_size)
    sizes = [file.stat().st_size if by_bytes else 1 for file in files]
    return rng.choices(files, sizes)[0]


class Warnings(logging.Handler):
    """Collects the warnings of the program."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def restored(run: pathlib.Path, template: TrainState, states: dict[int, TrainState]) -> str:
    """Restores, and returns ``same``, ``noticed``, or what is wrong."""
    caught, logger = Warnings(), logging.getLogger("clip_jax")
    logger.addHandler(caught)
    try:
        fingerprint = saved_fingerprint(run)
        variables = restore_variables(run)
        checkpointer = open_run(run)
        found = checkpointer.restore_latest(template)
        checkpointer.close()
    finally:
        logger.removeHandler(caught)
    step = int(found.state.step)
    if (found.position, found.data_fingerprint, fingerprint) != (step * BATCH_SIZE, FINGERPRINT, FINGERPRINT):
        return f"wrong position {found.position} or fingerprint {found.data_fingerprint}, {fingerprint}"
    if not _equal(found.state, states[step]):
        return f"wrong values of step {step}"
    if not any(_equal(variables, states[one].variables) for one in STEPS):
        return "wrong parameters"
    if step == STEPS[1]:
        return "same"
    return "noticed" if any(f"checkpoint {STEPS[1]} " in line for line in caught.lines) else "skipped without a warning"


def _equal(one, other) -> bool:
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), one, other)
    return all(jax.tree.leaves(same))


def trial(
    original: pathlib.Path, template: TrainState, states: dict[int, TrainState], kind: str, rng: random.Random
) -> tuple[str, str]:
    """Damages a copy of the run in this way. Returns the damaged file's name and what :func:`restored` returns."""
    with tempfile.TemporaryDirectory() as folder:
        run = pathlib.Path(shutil.copytree(original, pathlib.Path(folder) / "run"))
        newer = run / "checkpoints" / str(STEPS[1])
        file = choose_file(newer, rng, by_bytes=rng.random() < 0.5)
        name = str(file.relative_to(newer))
        KINDS[kind](file, rng)
        return name, restored(run, template, states)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--others", type=int, default=100, help="trials of each other kind of damage")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    set_up_logging(level=logging.ERROR)
    logging.getLogger("clip_jax").setLevel(logging.WARNING)
    logging.getLogger("clip_jax").handlers = []
    rng, template = random.Random(arguments.seed), small_template(make_mesh(1))
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        original = pathlib.Path(folder)
        states = save_both(original, template)
        for kind in KINDS:
            counts: collections.Counter[str] = collections.Counter()
            for number in range(arguments.flips if kind == "flip" else arguments.others):
                file, result = trial(original, template, states, kind, rng)
                counts[result if result in ("same", "noticed") else "wrong"] += 1
                if result not in ("same", "noticed"):
                    print(f"{kind} {number} of {file}: {result}", flush=True)
            failed += counts["wrong"]
            print(f"{kind}: {counts['noticed']} noticed, {counts['same']} without effect, {counts['wrong']} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
