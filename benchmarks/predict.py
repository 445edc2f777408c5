"""Measures how long `python -m clip_jax.predict` takes from a cold start, for one image and three labels.

python -m benchmarks.predict [--model=ViT-B/32] [--rounds=3]

The weights are random and in OpenAI's format; the image has 1600 by 1200 pixels. Each round starts new processes,
without a compilation cache. Prints the median wall seconds of the command, and of its parts, measured in a separate
process.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from clip_jax.models.clip import CLIP, example_inputs
from clip_jax.models.presets import CLIPPreset, get_preset
from clip_jax.weights import Weights, write_weights

PARTS = """
import sys, time
times = [time.perf_counter()]
def done(name):
    times.append(time.perf_counter())
    print(name, times[-1] - times[-2])
from clip_jax.loading import LoadedModel, read_weights
done("imports")
weights = read_weights(sys.argv[1])
done("reading the weights")
model = LoadedModel(weights, batch_size=64, dtype="float32")
done("weights to the device")
model.encode_text(["a cat", "a dog", "a house"])
done("text tower: trace, compile, run")
model.encode_image(sys.argv[2])
done("image: decode, resize; image tower: trace, compile, run")
"""


def random_weights(preset: CLIPPreset) -> Weights:
    """Returns the weights of a randomly initialized model."""
    inputs = (jnp.zeros(array.shape, array.dtype) for array in example_inputs(preset))
    variables = nn.meta.unbox(jax.jit(CLIP(preset).init)(jax.random.key(0), *inputs))
    return Weights(preset, {"batch_stats": {}} | jax.tree.map(np.asarray, variables), "random")


def write_inputs(folder: pathlib.Path, model: str) -> tuple[str, str]:
    """Writes weights and an image; returns their paths."""
    weights, image = folder / "weights.pt", folder / "photo.jpg"
    write_weights(random_weights(get_preset(model)), weights, "openai")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)).save(image)
    return str(weights), str(image)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B/32", help="a preset that OpenAI published")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights, image = write_inputs(pathlib.Path(folder), arguments.model)
        command = ["-m", "clip_jax.predict", f"--model={weights}", "--labels=a cat,a dog,a house", image]
        whole: list[float] = []
        parts: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            whole.append(time.perf_counter() - start)
            timed = subprocess.run(
                [sys.executable, "-c", PARTS, weights, image], check=True, capture_output=True, text=True
            )
            for line in timed.stdout.splitlines():
                name, _, seconds = line.rpartition(" ")
                parts.setdefault(name, []).append(float(seconds))
        print(f"{arguments.model} on {os.cpu_count()} cores, median of {arguments.rounds}")
        print(f"{statistics.median(whole):5.1f} s  the whole command")
        for name, seconds in parts.items():
            print(f"{statistics.median(seconds):5.1f} s  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
