"""Measures a training step on CPU against open_clip (PyTorch), for the quickstart's model or another size.

pip install -e ".[peers]" && python -m benchmarks.train_step [--rounds=5] [--steps=5] [--only=clip_jax] [NAME=VALUE]

Both use the same sizes, batch, loss and optimizer (float32, AdamW with the same hyperparameters), and random data.
After a warm-up, the rounds alternate between the implementations. Prints wall seconds and CPU seconds per step, the
median over rounds, and one ratio to the faster of open_clip's eager and compiled forms.
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable

import jax

from benchmarks.missing import has_peer
from benchmarks.random_data import random_batch
from clip_jax.config import load_config_file, override
from clip_jax.models.presets import model_preset
from clip_jax.sharding import to_global_batch
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import configured_mesh, create_state, make_model
from clip_jax.training.step import make_train_step

STEPS_OF_SCHEDULE = 1_000


def our_step(config) -> Callable[[], float]:
    mesh = configured_mesh(config)
    model, optimizer = make_model(config, mesh), make_optimizer(config.optimizer, STEPS_OF_SCHEDULE)
    train_step = make_train_step(config, model, optimizer, mesh)
    state = create_state(model, optimizer, config.seed, mesh)
    batch = random_batch(model_preset(config), config.global_batch_size)

    def step() -> float:
        nonlocal state
        arrays = to_global_batch(batch, mesh)
        state, metrics = train_step(state, arrays)
        return float(metrics["loss"])

    return step


def open_clip_step(config, compiled: bool) -> Callable[[], float]:
    import open_clip
    import torch

    from benchmarks.peers import open_clip_optimizer
    from clip_jax.models.preprocessing import IMAGE_MEAN, IMAGE_STD
    from clip_jax.weights.open_clip import config_of

    preset = model_preset(config)
    model = open_clip.CLIP(**config_of(preset)["model_cfg"]).train()
    forward = torch.compile(model) if compiled else model
    loss_fn = open_clip.ClipLoss()
    optimizer = open_clip_optimizer(model, config.optimizer)
    batch = random_batch(preset, config.global_batch_size)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    tokens = torch.from_numpy(batch["tokens"]).long()
    uint8_images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)

    def step() -> float:
        images = (uint8_images.float() / 255 - mean) / std
        optimizer.zero_grad(set_to_none=True)
        image_features, text_features, logit_scale = forward(images, tokens)
        loss = loss_fn(image_features, text_features, logit_scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        return loss.item()

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="in each round, of each implementation")
    parser.add_argument("--only", help="measure only clip_jax, 'open_clip eager' or 'open_clip compiled'")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="such as model.vision.width=192")
    arguments = parser.parse_args()
    config = load_config_file("configs/quickstart.py")
    for name, _, value in (item.partition("=") for item in arguments.overrides):
        override(config, name, value)
    makers = {"clip_jax": lambda: our_step(config)}
    versions = f"jax {jax.__version__}"
    if has_peer("open_clip", "torch torchvision open_clip"):
        importlib.import_module("benchmarks.peers")  # must come first
        import open_clip
        import torch

        makers["open_clip eager"] = lambda: open_clip_step(config, compiled=False)
        makers["open_clip compiled"] = lambda: open_clip_step(config, compiled=True)
        versions += f", torch {torch.__version__}, open_clip {open_clip.__version__}"
    implementations = {name: make() for name, make in makers.items() if arguments.only in (None, name)}
    if not implementations:
        print(f"--only={arguments.only} must be one of {', '.join(makers)}", file=sys.stderr)
        return 2
    print(versions)
    vision = config.model.vision
    print(
        f"{vision.image_size} px, patch {vision.patch_size}, width {vision.width}, {vision.num_layers} layers, "
        f"batch {config.global_batch_size}, float32"
    )
    for name, step in implementations.items():
        for _ in range(3):
            loss = step()
        print(f"{name}: warm, loss {loss:.3f}", flush=True)

    wall: dict[str, list[float]] = {name: [] for name in implementations}
    cpu: dict[str, list[float]] = {name: [] for name in implementations}
    for _ in range(arguments.rounds):
        for name, step in implementations.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(arguments.steps):
                step()
            wall[name].append((time.perf_counter() - wall_start) / arguments.steps)
            cpu[name].append((time.process_time() - cpu_start) / arguments.steps)

    images = config.global_batch_size
    for name in implementations:
        seconds, cpu_seconds = statistics.median(wall[name]), statistics.median(cpu[name])
        print(f"{name:20} {seconds:7.3f} s wall  {cpu_seconds:7.3f} s CPU  {images / seconds:6.0f} images/s")
    if len(implementations) == 1:
        return 0
    for measure, values in (("wall", wall), ("CPU", cpu)):
        peers = {name: statistics.median(value) for name, value in values.items() if name != "clip_jax"}
        best = min(peers, key=peers.get)
        ratio = peers[best] / statistics.median(values["clip_jax"])
        print(f"{measure}: clip_jax at {ratio:.2f} times the speed of {best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
