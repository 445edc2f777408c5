"""What both sides of :mod:`benchmarks.accelerator` share: timing of a run, its config, and the name of a failure."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np

from benchmarks.random_data import random_batch
from clip_jax.config import default_config
from clip_jax.models.presets import model_preset
from clip_jax.planning.model_flops import step_flops

WARM_UP = 3  # runs, the first of which compiles; two if they are slow
LONG_SECONDS = 4.0
ROUND_SECONDS = 0.25  # minimal length of a round, so that waiting for the device after each run does not count
MAX_RUNS = 10  # in a round, since each queued run may use its own memory
LEAST_ROUNDS = 3
COPIES = 4  # batches in one call of embedding, so that reading one can overlap with computing the next
LOGIT_SCALE = float(np.log(1 / 0.07))
OUT_OF_MEMORY = ("resource_exhausted", "out of memory", "outofmemory", "can't allocate memory", "memoryerror")


class NotThereError(Exception):
    """A measurement is impossible on this machine; the message states what is missing."""


def status_of(error: BaseException) -> str:
    """Returns "not there: …", "does not fit" or "failed: …", in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, ImportError | NotThereError):
        return f"not there: {error}"
    if any(sign in text.lower() for sign in OUT_OF_MEMORY):
        return "does not fit"
    return f"failed: {text[:200]}"


def config_of(case: dict, setting: dict) -> ml_collections.ConfigDict:
    """Returns the config of ``case["model"]`` with the batch size, remat, form and loss of ``setting``."""
    config = default_config(case["model"])
    config.global_batch_size = setting["batch_size"]
    for name in ("remat", "scan_unroll", "fused_attention"):
        config.model[name] = setting.get(name, config.model[name])
    config.loss.form = setting.get("loss", config.loss.form)
    return config


def timed(run: Callable[[], Any], wait: Callable[[Any], Any], spec: dict, warmed_up: Callable[[], dict] = dict) -> dict:
    """Returns ``{"seconds": of one run, "rounds": ...}``, the median over rounds; a round ends when the device is done.

    ``wait`` blocks until the result of ``run`` is ready. ``spec["rounds"]`` and ``spec["round_limit_s"]`` limit the
    rounds, and ``spec["finish_by"]``, in seconds since 1970, the end. The result includes what ``warmed_up`` returns
    after the first runs: peak memory, before several runs are queued.
    """
    for count in range(WARM_UP):
        start = time.perf_counter()
        wait(run())
        estimate = time.perf_counter() - start
        if count and estimate > LONG_SECONDS:
            break
    extra = warmed_up()
    runs = min(math.ceil(min(ROUND_SECONDS, spec["round_limit_s"] / spec["rounds"]) / estimate), MAX_RUNS)
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < spec["rounds"]:
        used = time.perf_counter() - begin
        if len(seconds) >= LEAST_ROUNDS and used > spec["round_limit_s"]:
            break
        if seconds and time.time() + 2 * runs * seconds[-1] > spec["finish_by"]:
            break
        start = time.perf_counter()
        for _ in range(runs):
            output = run()
        wait(output)
        seconds.append((time.perf_counter() - start) / runs)
    return {"seconds": statistics.median(seconds), "rounds": len(seconds), "runs_a_round": runs, **extra}


def run_of(function: Callable, *inputs: Any) -> Callable[[], Any]:
    return lambda: function(*inputs)


def with_pairs(spec: dict, result: dict, loss: float) -> dict:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    batch_size = spec["setting"]["batch_size"]
    preset = model_preset(config_of(spec["case"], spec["setting"]))
    flops = sum(step_flops(preset, batch_size).values())
    return result | {"rate": batch_size / result["seconds"], "model_flops": flops, "loss": loss}


def inputs_to_embed(spec: dict) -> np.ndarray:
    """Returns several batches of uint8 images or of tokens."""
    preset = model_preset(config_of(spec["case"], spec["setting"]))
    batch = random_batch(preset, COPIES * spec["setting"]["batch_size"])
    return batch["image" if spec["case"]["input"] == "images" else "tokens"]
