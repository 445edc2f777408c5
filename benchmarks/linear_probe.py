"""Measures time and accuracy of the linear probe on 20,000 feature vectors, against scikit-learn as in the paper.

pip install -e ".[peers]" && python -m benchmarks.linear_probe [--rounds=3] [--length=10] [--cosine=0.5] [--sweep]

Both get the same float32 arrays, the same C and 1,000 iterations, and take turns in one process. scikit-learn keeps its
default tolerance and number of threads. Features are random class centers with noise and a common component, like image
embeddings. C is the value of OpenAI's README, and the features have about the length that it was chosen for.
``--sweep`` also times the whole search for C, for clip_jax only. Prints medians over rounds and one ratio.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.missing import has_peer
from clip_jax.evaluation.linear_probe import Split, fit, linear_probe
from clip_jax.sharding import make_mesh

NUM_CLASSES = 100
TEST_COUNT = 5_000
C = 0.316


def make_splits(count: int, width: int, length: float, cosine: float) -> tuple[Split, Split]:
    """Returns train and test; features of different classes have about this ``cosine``."""
    random = np.random.default_rng(0)
    # In real embeddings, the variance also differs by direction.
    spread = np.arange(1, width + 1, dtype=np.float32) ** -0.5

    def directions(number: int) -> np.ndarray:
        return random.standard_normal((number, width), np.float32) * spread

    labels = random.integers(0, NUM_CLASSES, count + TEST_COUNT)
    own = 0.2 * directions(NUM_CLASSES)[labels] + directions(len(labels))
    features = own + np.sqrt(cosine / (1 - cosine)) * directions(1)
    features *= length / np.linalg.norm(features, axis=1, keepdims=True)
    return Split(features[:count], labels[:count]), Split(features[count:], labels[count:])


def timed(function: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--length", type=float, default=10)
    parser.add_argument("--cosine", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    train, test = make_splits(arguments.count, arguments.width, arguments.length, arguments.cosine)
    mesh = make_mesh(fsdp=1)

    def ours() -> float:
        probe = fit(*train, NUM_CLASSES, C, mesh)
        return float((probe.scores(test.features).argmax(axis=1) == test.labels).mean())

    def theirs() -> float:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=C, max_iter=1000).fit(*train).score(*test)

    first, _ = timed(ours)
    implementations = {"clip_jax": ours}
    if has_peer("scikit-learn", "sklearn"):
        implementations["scikit-learn"] = theirs
    seconds: dict[Callable, list[float]] = {implementation: [] for implementation in implementations.values()}
    accuracies: dict[Callable, float] = {}
    for _ in range(arguments.rounds):
        for implementation in seconds:
            elapsed, accuracies[implementation] = timed(implementation)
            seconds[implementation].append(elapsed)

    print(f"{arguments.count} x {arguments.width}, {NUM_CLASSES} classes, C = {C}, {len(jax.devices())} device(s)")
    medians = {implementation: statistics.median(values) for implementation, values in seconds.items()}
    for name, implementation in implementations.items():
        print(f"{name:12} {medians[implementation]:7.2f} s  accuracy {100 * accuracies[implementation]:.2f} %")
    print(f"clip_jax's first fit, which also compiles: {first:.2f} s")
    if theirs in medians:
        print(
            f"clip_jax takes 1/{medians[theirs] / medians[ours]:.1f} of scikit-learn's time, "
            f"its first fit 1/{medians[theirs] / first:.1f}"
        )
    if arguments.sweep:
        elapsed, result = timed(lambda: linear_probe(train, test, NUM_CLASSES, mesh))
        print(
            f"choosing C and scoring: {elapsed:.1f} s, C = {result['C']:.3g}, accuracy {100 * result['accuracy']:.2f} %"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
