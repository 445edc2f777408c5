"""The PyTorch side of :mod:`benchmarks.accelerator`: runs open_clip's model as open_clip's training script does.

That is: bfloat16 by autocast, the default attention, fused AdamW, and the script's settings for convolutions and
float32 products. The inputs are on the device as normalized pixels in bfloat16, to which autocast would convert them
anyway.
"""

import importlib
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.accelerator_timing import (
    LOGIT_SCALE,
    NotThereError,
    config_of,
    inputs_to_embed,
    run_of,
    timed,
    with_pairs,
)
from benchmarks.random_data import random_batch
from clip_jax.models.presets import model_preset

PIXELS_AT_ONCE = 256  # images that are normalized together, so that this does not determine the peak memory


def import_torch(platform: str) -> tuple[Any, str]:
    """Returns PyTorch, and its name for the device that JAX calls ``platform``.

    Raises:
      NotThereError: PyTorch does not find that device.
      ImportError: it is not installed.
    """
    importlib.import_module("benchmarks.peers")  # must come before open_clip
    import torch

    if platform == "cpu":
        return torch, "cpu"
    if platform != "gpu" or not torch.cuda.is_available():
        raise NotThereError(f"PyTorch {torch.__version__} finds no {platform}")
    torch.backends.cuda.matmul.allow_tf32 = True  # both as in open_clip's training script
    torch.backends.cudnn.benchmark = True
    torch.cuda.set_device(0)
    return torch, "cuda"


def torch_waits(torch: Any, target: str) -> tuple[Callable[[Any], None], Callable[[], dict]]:
    """Returns a function that waits for the device, and one that reads its peak memory."""
    if target == "cpu":
        return lambda _: None, lambda: {"peak_bytes": None}
    return lambda _: torch.cuda.synchronize(), lambda: {"peak_bytes": torch.cuda.max_memory_allocated()}


def torch_ceiling(spec: dict) -> dict:
    torch, target = import_torch(spec["platform"])
    wait, _ = torch_waits(torch, target)
    size = spec["case"]["size"]
    if spec["case"]["what"] == "copy":
        x = torch.ones(size // 4, device=target)
        result = timed(run_of(torch.empty_like(x).copy_, x), wait, spec)
        return result | {"rate": 2 * size / result["seconds"]}
    left, right = (torch.randn(size, size, device=target, dtype=torch.bfloat16) for _ in range(2))
    result = timed(run_of(torch.matmul, left, right), wait, spec)
    return result | {"rate": 2 * size**3 / result["seconds"]}


def open_clip_model(spec: dict) -> tuple[Any, Any, str]:
    """Returns open_clip's model of ``spec["model_cfg"]`` on the device, PyTorch, and the device."""
    torch, target = import_torch(spec["platform"])
    import open_clip

    return open_clip.CLIP(**spec["model_cfg"]).to(target), torch, target


def pixels_for_torch(torch: Any, images: Any, spec: dict) -> Any:
    """Converts uint8 ``[B, S, S, 3]`` to normalized bfloat16 ``[B, 3, S, S]`` on the same device."""
    mean, std = (torch.tensor(spec[name], device=images.device).view(1, 3, 1, 1) for name in ("mean", "std"))
    return ((images.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(torch.bfloat16)


def open_clip_trainer(spec: dict) -> Callable[[], Any]:
    model, torch, target = open_clip_model(spec)
    import open_clip

    from benchmarks.peers import open_clip_optimizer

    config = config_of(spec["case"], spec["setting"])
    if spec["setting"]["checkpointing"]:
        model.set_grad_checkpointing()
    layout = torch.channels_last if spec["setting"].get("channels_last") else torch.contiguous_format
    model = model.to(memory_format=layout)
    forward = torch.compile(model.train()) if spec["setting"]["compiled"] else model.train()
    loss_fn = open_clip.ClipLoss()
    optimizer = open_clip_optimizer(model, config.optimizer)
    batch = random_batch(model_preset(config), config.global_batch_size)
    tokens = torch.from_numpy(batch["tokens"]).long().to(target)
    size = config.model.vision.image_size
    pixels = torch.empty(config.global_batch_size, 3, size, size, device=target, dtype=torch.bfloat16)
    for start in range(0, len(pixels), PIXELS_AT_ONCE):
        part = slice(start, start + PIXELS_AT_ONCE)
        pixels[part] = pixels_for_torch(torch, torch.from_numpy(batch["image"][part]).to(target), spec)

    pixels = pixels.to(memory_format=layout)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(target, dtype=torch.bfloat16):
            image_features, text_features, logit_scale = forward(pixels, tokens)
            loss = loss_fn(image_features, text_features, logit_scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss

    return step


def open_clip_step(spec: dict) -> dict:
    step = open_clip_trainer(spec)
    torch, target = import_torch(spec["platform"])
    wait, peak = torch_waits(torch, target)
    wait(step())
    if target == "cuda":
        torch.cuda.reset_peak_memory_stats()  # without the memory that compilation used; JAX's peak cannot be reset
    result = timed(step, wait, spec, peak)
    return with_pairs(spec, result, step().item())


def open_clip_start(spec: dict) -> dict:
    step = open_clip_trainer(spec)
    step().item()
    seconds = time.time() - spec["started"]
    return {"seconds": seconds, "rate": 1 / seconds}


def open_clip_loss(spec: dict) -> dict:
    torch, target = import_torch(spec["platform"])
    import open_clip

    from benchmarks.loss import embeddings

    setting = spec["setting"]
    # In open_clip's training, autocast converts the similarities to bfloat16.
    torch.backends.cuda.matmul.allow_tf32 = setting["precision"] == "tf32"
    loss_fn = torch.compile(open_clip.ClipLoss()) if setting["compiled"] else open_clip.ClipLoss()
    arrays = *embeddings(spec["case"]["pairs"], spec["case"]["width"]), np.float32(LOGIT_SCALE)
    images, texts, logit_scale = leaves = [torch.tensor(x, device=target, requires_grad=True) for x in arrays]

    def run() -> Any:
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast(target, dtype=torch.bfloat16, enabled=setting["precision"] == "bfloat16"):
            loss = loss_fn(images, texts, logit_scale.exp())
        loss.backward()
        return loss

    wait, peak = torch_waits(torch, target)
    wait(run())
    if target == "cuda":
        torch.cuda.reset_peak_memory_stats()  # without the memory that compilation used
    result = timed(run, wait, spec, peak)
    return result | {"rate": 1 / result["seconds"], "loss": run().item()}


def open_clip_embedding(spec: dict) -> dict:
    model, torch, target = open_clip_model(spec)
    images = spec["case"]["input"] == "images"
    encode = model.eval().encode_image if images else model.eval().encode_text
    encode = torch.compile(encode) if spec["setting"]["compiled"] else encode
    inputs = torch.from_numpy(inputs_to_embed(spec))
    if target == "cuda":
        inputs = inputs.pin_memory()  # as open_clip's data loader does

    def run() -> np.ndarray:
        results = []
        with torch.inference_mode(), torch.autocast(target, dtype=torch.bfloat16):
            for batch in inputs.split(spec["setting"]["batch_size"]):
                batch = batch.to(target, non_blocking=True)
                batch = pixels_for_torch(torch, batch, spec) if images else batch.long()
                results.append(encode(batch, normalize=True))
            return torch.cat(results).float().cpu().numpy()

    _, peak = torch_waits(torch, target)
    result = timed(run, lambda _: None, spec, peak)
    return result | {"rate": len(inputs) / result["seconds"]}
