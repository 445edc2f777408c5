"""Measures image-text retrieval on CPU: clip_jax's recalls, computed in blocks, against CLIP_benchmark's in PyTorch.

pip install -e ".[peers]" && python -m benchmarks.retrieval [--images=25000] [--peer-images=5000] [--width=512]

Float32, five texts per image. Each measurement runs in its own process. The peak is the process's resident memory
(Linux: VmHWM) above that after imports, so it includes the embeddings. CLIP_benchmark holds several copies of all
scores. The two are therefore compared on fewer images, and then clip_jax runs alone at full size. Recalls at 1, 5 and
10 in both directions are printed and must be equal.
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np

from benchmarks.loss import resident_bytes
from benchmarks.missing import has_peer

TEXTS_AN_IMAGE = 5


def example(images: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns unit vectors of images and texts, and the index of each text's image."""
    random = np.random.default_rng(0)
    image_of = np.repeat(np.arange(images), TEXTS_AN_IMAGE)
    image_embeddings = random.standard_normal((images, width), np.float32)
    text_embeddings = image_embeddings[image_of] + 4 * random.standard_normal((len(image_of), width), np.float32)
    for embeddings in (image_embeddings, text_embeddings):
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return image_embeddings, text_embeddings, image_of


def ours(images: np.ndarray, texts: np.ndarray, image_of: np.ndarray) -> dict[str, float]:
    from clip_jax.evaluation.retrieval import recalls, retrieval_ranks

    numbers = np.arange(len(images))
    return recalls(retrieval_ranks(images, texts, numbers, image_of), retrieval_ranks(texts, images, image_of, numbers))


def clip_benchmarks(images: np.ndarray, texts: np.ndarray, image_of: np.ndarray) -> dict[str, float]:
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = torch.from_numpy(texts) @ torch.from_numpy(images).t()
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(texts)), torch.from_numpy(image_of)] = True
    ways = {"image_to_text": (scores.T, positive.T), "text_to_image": (scores, positive)}
    return {
        f"{way}_recall@{k}": (batchify(recall_at_k, *both, 64, "cpu", k=k) > 0).float().mean().item()
        for way, both in ways.items()
        for k in (1, 5, 10)
    }


def measure(which: str, images: int, width: int) -> dict:
    """Runs one measurement in its own process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.retrieval",
        f"--only={which}",
        f"--images={images}",
        f"--width={width}",
    ]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def print_comparison(ours: dict, theirs: dict) -> None:
    print(
        f"ours takes 1/{theirs['bytes'] / ours['bytes']:.1f} of the memory, "
        f"{theirs['seconds'] / ours['seconds']:.1f} x as fast"
    )
    for name, value in ours["recalls"].items():
        difference = abs(value - theirs["recalls"][name])
        print(f"  {name:26} {value:.6f}" + (f"  differs by {difference:.2g}" if difference > 1e-6 else "  the same"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=25_000)
    parser.add_argument("--peer-images", type=int, default=5_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--only", choices=("clip_jax", "CLIP_benchmark"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        run = ours if arguments.only == "clip_jax" else clip_benchmarks
        run(*example(16, 8))  # imports
        before = resident_bytes("VmRSS")
        inputs, started = example(arguments.images, arguments.width), time.perf_counter()
        recalls = run(*inputs)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "bytes": resident_bytes("VmHWM") - before, "recalls": recalls}))
        return
    names = ["clip_jax"]
    if has_peer("CLIP_benchmark", "torch torchvision open_clip clip_benchmark"):
        names.append("CLIP_benchmark")
    pair = {which: measure(which, arguments.peer_images, arguments.width) for which in names}
    for which, found in pair.items():
        print(f"{arguments.peer_images:,} images: {which:16} {found['seconds']:7.1f} s  {found['bytes'] / 1e9:6.2f} GB")
    if "CLIP_benchmark" in pair:
        print_comparison(*pair.values())
    whole = measure("clip_jax", arguments.images, arguments.width)
    print(f"{arguments.images:,} images: {'clip_jax':16} {whole['seconds']:7.1f} s  {whole['bytes'] / 1e9:6.2f} GB")


if __name__ == "__main__":
    main()
