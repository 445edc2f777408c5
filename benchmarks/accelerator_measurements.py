"""Runs one measurement of :mod:`benchmarks.accelerator` in its own process: takes a JSON object and prints another.

python -m benchmarks.accelerator_measurements '{"part": "step", "side": "clip_jax", ...}'

clip_jax runs the code that trains and embeds, built from a config. PyTorch runs open_clip's model as open_clip's
training script does: bfloat16 by autocast, the default attention, fused AdamW, and the script's settings for
convolutions and float32 products. Each side's inputs are on the device in the form that it takes. For PyTorch these are
normalized pixels in bfloat16, to which autocast would convert them anyway.
"""

import contextlib
import importlib
import importlib.metadata
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import optax

from benchmarks.random_data import random_batch
from clip_jax.config import default_config
from clip_jax.models.presets import model_preset

STEPS_OF_SCHEDULE = 1_000
WARM_UP = 3  # runs, the first of which compiles; two if they are slow
LONG_SECONDS = 4.0
ROUND_SECONDS = 0.25  # minimal length of a round, so that waiting for the device after each run does not count
MAX_RUNS = 10  # in a round, since each queued run may use its own memory
LEAST_ROUNDS = 3
CHECK_TOLERANCE = 0.02  # bfloat16 differs from float32 by about a tenth of this
LOGIT_SCALE = float(np.log(1 / 0.07))
COPIES = 4  # batches in one call of embedding, so that reading one can overlap with computing the next
PIXELS_AT_ONCE = 256  # images that are normalized together, so that this does not determine the peak memory
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


# The machine


def probe(spec: dict) -> dict:
    """Returns the device, versions, and why a side is missing."""
    import jax

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    found = {
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "memory_limit_bytes": stats.get("bytes_limit"),
        },
        "versions": versions | {"python": sys.version.split()[0]},
        "missing": {},
    }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split()
            found["versions"] |= {"driver": answer[0]} if answer else {}
    try:
        torch, target = import_torch(device.platform)
        found["versions"]["torch"] = torch.__version__
        if target == "cuda":
            found["device"]["pytorch_kind"] = torch.cuda.get_device_name(0)
    except Exception as error:  # a broken installation can raise anything
        return found | {"missing": dict.fromkeys(("pytorch", "open_clip"), status_of(error))}
    try:
        import open_clip

        found["versions"]["open_clip"] = open_clip.__version__
    except Exception as error:
        found["missing"]["open_clip"] = status_of(error)
    return found


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


def jax_peak() -> dict:
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}  # None on a CPU
    return {"peak_bytes": stats.get("peak_bytes_in_use")}


def program_peak(compiled: Any) -> dict:
    """Returns a program's memory with arguments and results; :func:`jax_peak` also has that of choosing kernels."""
    memory = compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    return {"peak_bytes": sum(sizes) - memory.alias_size_in_bytes}


def torch_waits(torch: Any, target: str) -> tuple[Callable[[Any], None], Callable[[], dict]]:
    """Returns a function that waits for the device, and one that reads its peak memory."""
    if target == "cpu":
        return lambda _: None, lambda: {"peak_bytes": None}
    return lambda _: torch.cuda.synchronize(), lambda: {"peak_bytes": torch.cuda.max_memory_allocated()}


# The ceilings of the device


def jax_ceiling(spec: dict) -> dict:
    import jax
    import jax.numpy as jnp

    size = spec["case"]["size"]
    if spec["case"]["what"] == "copy":
        x = jnp.ones(size // 4, jnp.float32)
        # Reads and writes each byte once, as a copy does; a plain copy might be left out by the compiler.
        result = timed(run_of(jax.jit(jnp.negative), x), jax.block_until_ready, spec)
        return result | {"rate": 2 * size / result["seconds"]}
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    result = timed(run_of(jax.jit(jnp.matmul), left, right), jax.block_until_ready, spec)
    return result | {"rate": 2 * size**3 / result["seconds"]}


def run_of(function: Callable, *inputs: Any) -> Callable[[], Any]:
    return lambda: function(*inputs)


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


# A training step


class Trainer(NamedTuple):
    """``step()`` runs one step and returns its metrics; ``state()`` returns the state after the steps so far."""

    step: Callable[[], dict]
    state: Callable[[], Any]


def our_trainer(spec: dict) -> Trainer:
    """Returns the training of ``clip_jax.main`` for a config, on the first device only."""
    import jax

    from clip_jax.sharding import to_global_batch
    from clip_jax.training.optimizer import make_optimizer
    from clip_jax.training.state import configured_mesh, create_state, make_model
    from clip_jax.training.step import make_train_step

    config = config_of(spec["case"], spec["setting"])
    mesh = configured_mesh(config, jax.devices()[:1])
    model, optimizer = make_model(config, mesh), make_optimizer(config.optimizer, STEPS_OF_SCHEDULE)
    train_step = make_train_step(config, model, optimizer, mesh)
    state = create_state(model, optimizer, config.seed, mesh)
    batch = to_global_batch(random_batch(model_preset(config), config.global_batch_size), mesh)

    def step() -> dict:
        nonlocal state
        state, metrics = train_step(state, batch)
        return metrics

    return Trainer(step, lambda: state)


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

    config = config_of(spec["case"], spec["setting"])
    if spec["setting"]["checkpointing"]:
        model.set_grad_checkpointing()
    layout = torch.channels_last if spec["setting"].get("channels_last") else torch.contiguous_format
    model = model.to(memory_format=layout)
    forward = torch.compile(model.train()) if spec["setting"]["compiled"] else model.train()
    loss_fn = open_clip.ClipLoss()
    settings = config.optimizer
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": settings.weight_decay}],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )
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


def with_pairs(spec: dict, result: dict, loss: float) -> dict:
    from clip_jax.planning.model_flops import step_flops

    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    batch_size = spec["setting"]["batch_size"]
    preset = model_preset(config_of(spec["case"], spec["setting"]))
    flops = sum(step_flops(preset, batch_size).values())
    return result | {"rate": batch_size / result["seconds"], "model_flops": flops, "loss": loss}


def our_step(spec: dict) -> dict:
    import jax

    step = our_trainer(spec).step
    result = timed(step, jax.block_until_ready, spec, jax_peak)
    return with_pairs(spec, result, float(step()["loss"]))


def open_clip_step(spec: dict) -> dict:
    step = open_clip_trainer(spec)
    torch, target = import_torch(spec["platform"])
    wait, peak = torch_waits(torch, target)
    wait(step())
    if target == "cuda":
        torch.cuda.reset_peak_memory_stats()  # without the memory that compilation used; JAX's peak cannot be reset
    result = timed(step, wait, spec, peak)
    return with_pairs(spec, result, step().item())


# The fastest form has the gradients of the plain one


def our_check(spec: dict) -> dict:
    """Compares the first step's loss and gradients with and without fused attention, both in bfloat16.

    Raises:
      ArithmeticError: they differ by more than rounding, or are not finite.
    """
    import jax

    results = []
    for fused in (True, False):
        trainer = our_trainer(spec | {"setting": spec["setting"] | {"fused_attention": fused}})
        loss = float(trainer.step()["loss"])
        moments = jax.tree.map(np.asarray, optax.tree.get(trainer.state().opt_state, "mu"))  # (1 - beta1) x gradient
        results.append((loss, moments))
    (loss, gradients), (expected_loss, expected) = results
    whole = math.sqrt(sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(expected)))
    difference = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b)) / whole, gradients, expected)
    greatest = max(jax.tree.leaves(difference))
    if not (abs(loss - expected_loss) < CHECK_TOLERANCE * expected_loss and greatest < CHECK_TOLERANCE):
        raise ArithmeticError(
            f"fused attention differs: loss {loss} against {expected_loss}, gradients by {greatest:.2%} of their norm"
        )
    seconds = time.time() - spec["started"]
    return {"seconds": seconds, "rate": 1 / seconds, "loss": loss, "difference": greatest}


# From the start of the process to the end of the first step


def our_start(spec: dict) -> dict:
    import jax

    jax.block_until_ready(our_trainer(spec).step())
    seconds = time.time() - spec["started"]
    return {"seconds": seconds, "rate": 1 / seconds}


def open_clip_start(spec: dict) -> dict:
    step = open_clip_trainer(spec)
    step().item()
    seconds = time.time() - spec["started"]
    return {"seconds": seconds, "rate": 1 / seconds}


# The loss alone


def our_loss(spec: dict) -> dict:
    import jax
    import jax.numpy as jnp

    from benchmarks.loss import embeddings
    from clip_jax.losses import default_section, make_loss
    from clip_jax.sharding import make_mesh

    section = default_section()
    section.update(form=spec["setting"]["loss"], block_size=spec["setting"].get("block_size", 0))
    mesh, pairs = make_mesh(1, jax.devices()[:1]), spec["case"]["pairs"]
    loss = make_loss(section, mesh, pairs, "bfloat16")  # as in the default training
    inputs = *map(jnp.array, embeddings(pairs, spec["case"]["width"])), {"logit_scale": jnp.float32(LOGIT_SCALE)}
    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)).lower(*inputs).compile()
    result = timed(run_of(function, *inputs), jax.block_until_ready, spec, lambda: program_peak(function))
    return result | {"rate": 1 / result["seconds"], "loss": float(function(*inputs)[0][0])}


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


# Embedding


def inputs_to_embed(spec: dict) -> np.ndarray:
    """Returns several batches of uint8 images or of tokens."""
    preset = model_preset(config_of(spec["case"], spec["setting"]))
    batch = random_batch(preset, COPIES * spec["setting"]["batch_size"])
    return batch["image" if spec["case"]["input"] == "images" else "tokens"]


def our_embedding(spec: dict) -> dict:
    import jax

    from benchmarks.predict import random_weights
    from clip_jax.loading import LoadedModel

    if jax.device_count() > 1:
        raise NotThereError(f"clip_jax.load embeds on all {jax.device_count()} devices, PyTorch on one")
    weights = random_weights(model_preset(config_of(spec["case"], spec["setting"])))
    embedder = LoadedModel(weights, spec["setting"]["batch_size"], spec["setting"]["precision"]).embedder
    encode = embedder.encode_image if spec["case"]["input"] == "images" else embedder.encode_tokens
    inputs = inputs_to_embed(spec)
    result = timed(run_of(encode, inputs), lambda _: None, spec, jax_peak)  # no waiting: the results are numpy arrays
    return result | {"rate": len(inputs) / result["seconds"]}


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


MEASUREMENTS: dict[tuple[str, str], Callable[[dict], dict]] = {
    ("probe", "clip_jax"): probe,
    ("check", "clip_jax"): our_check,
    ("ceilings", "jax"): jax_ceiling,
    ("ceilings", "pytorch"): torch_ceiling,
    ("step", "clip_jax"): our_step,
    ("step", "open_clip"): open_clip_step,
    ("loss", "clip_jax"): our_loss,
    ("loss", "open_clip"): open_clip_loss,
    ("embed", "clip_jax"): our_embedding,
    ("embed", "open_clip"): open_clip_embedding,
    ("start", "clip_jax"): our_start,
    ("start", "open_clip"): open_clip_start,
}


def main() -> int:
    spec = json.loads(sys.argv[1])
    try:
        result = {"status": "ok"} | MEASUREMENTS[spec["part"], spec["side"]](spec)
    except Exception as error:  # the report has the error; the next measurement runs in its own process
        if not isinstance(error, NotThereError | ImportError):
            sys.excepthook(type(error), error, error.__traceback__)
        result = {"status": status_of(error)}
    print("\n" + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
