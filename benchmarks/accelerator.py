"""Measures clip_jax against open_clip (PyTorch) on one accelerator: step, loss, embedding, time to the first step.

python -m benchmarks.accelerator [--only=check,ceilings,step,loss,embed,start] [--models=ViT-L/14] [--minutes=N]
    [--resume] [--small] [--output=runs/accelerator.json]
python -m benchmarks.accelerator --table=runs/accelerator.json

Data is random. Each measurement runs in its own process with a deadline, warms up, and takes the median of rounds that
end when the device has finished. clip_jax and open_clip take turns. Batches double until one does not fit. clip_jax is
measured with each remat policy and form of the loss, and without the choices of :mod:`clip_jax.models.execution` for
the device; open_clip with and without compilation and gradient checkpointing. Before all measurements, one step with
cuDNN's attention is compared with one without.

Tables are printed to stdout. All results are in a JSON report, which is written after each measurement. With
``--minutes``, the most important measurements are first, and the others are listed as left out; ``--resume`` continues
from there. ``--small`` runs everything at sizes for a CPU.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import NamedTuple

from benchmarks.accelerator_report import (
    CEILING_SIDES,
    PARTS,
    describe,
    progress,
    summarize,
    tables,
    with_shares,
)
from clip_jax.config import default_config
from clip_jax.losses.softmax import FORMS
from clip_jax.models.execution import REMAT_POLICIES
from clip_jax.models.presets import PRESETS, model_preset
from clip_jax.settings import DTYPES

MODELS = ("ViT-L/14", "ViT-B/32", "ViT-B/16", "RN50")  # the most important first
FIRST_BATCH = {"ViT-L/14": 128, "ViT-B/16": 256, "ViT-B/32": 512, "RN50": 256}
LARGEST_BATCH = 32_768  # the paper's
LOSSES = tuple(form for form in FORMS if form != "auto")  # "auto" chooses one of the others
BLOCK_SIZES = (1_024, 4_096, 16_384)  # in addition to the one that clip_jax.models.execution chose
SMALLEST_BATCH = 8
CHECKED_BATCH = 8
SMALL_MODEL = "ViT-tiny"
DEADLINE_S = 420  # of one measurement; most of it is for compiling the largest model
LEAST_S = 15  # with less time left, no measurement is started
GAIN = 1.03  # if doubling the batch gains less than this, larger batches are measured last
REPOSITORY = pathlib.Path(__file__).parent.parent

# By default, JAX leaves a quarter of the memory unused.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    "CUDA_VISIBLE_DEVICES": "0",
}
SMALL_ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # compilation would otherwise take most of the time
REPORTED_ENVIRONMENT = (
    *ENVIRONMENT,
    *SMALL_ENVIRONMENT,
    "XLA_FLAGS",
    "JAX_PLATFORMS",
    "LIBTPU_INIT_ARGS",
    "PYTORCH_CUDA_ALLOC_CONF",
)


class Duel(NamedTuple):
    """Settings of both sides that take turns on one ``case``, with batch sizes doubling from ``first`` to ``largest``.

    ``settings`` are (side, setting). ``first`` is None if there is no batch.
    """

    part: str
    case: dict
    settings: tuple[tuple[str, dict], ...]
    first: int | None = None
    largest: int = 0


# Which measurements there are, and their order


def plan(parts: Iterable[str], models: Iterable[str] = MODELS, small: bool = False) -> list[Duel]:
    """Returns all duels of these parts and models, the most important first."""
    order = small_plan() if small else whole_plan(list(models))
    return [duel for duel in order if duel.part in parts]


def whole_plan(models: list[str]) -> list[Duel]:
    first, others = steps(models[0]), [steps(model) for model in models[1:]]
    order = [*checks(models), *ceilings(8_192, 2**30), *first[:2], losses(32_768), *first[2:4], *choices(models[0])]
    order += [*embeddings(models[0], 512), *starts(models[0], 64)]
    order += [duel for duels in others for duel in duels[:2]]
    order += [losses(8_192), losses(131_072)]
    order += [duel for duels in others for duel in duels[2:4]]
    order += [duel for duels in (first, *others) for duel in duels[4:]]
    order += embeddings(models[0], 64)
    for model in models[1:]:
        order += [*embeddings(model, 512), *embeddings(model, 64), *starts(model, 64)]
    return order


def small_plan() -> list[Duel]:
    """Returns each part of each side once, at sizes for seconds on a CPU. PyTorch compiles once, which is slow."""
    case, compiled = {"model": SMALL_MODEL}, {"compiled": True, "checkpointing": False}
    first = (("clip_jax", {"remat": "none", "loss": "gather"}), ("open_clip", compiled))
    second = (
        ("clip_jax", {"remat": "full", "loss": "blockwise"}),
        ("open_clip", {"compiled": False, "checkpointing": True}),
    )

    def without_compiling(duel: Duel) -> Duel:
        return duel._replace(settings=tuple(item for item in duel.settings if not item[1].get("compiled")))

    others = [losses(2_048, width=64), *embeddings(SMALL_MODEL, 8), *starts(SMALL_MODEL, 8)]
    training = [Duel("step", case, settings, 8, 8) for settings in (first, second)]
    training += choices(SMALL_MODEL, batch_size=8)
    return [*checks([SMALL_MODEL]), *ceilings(256, 2**22), *training, *map(without_compiling, others)]


def checks(models: list[str]) -> list[Duel]:
    """Returns the checks that cuDNN's attention gives the same gradients; no other measurement would detect it."""
    return [Duel("check", {"model": model}, (("clip_jax", {}),), CHECKED_BATCH, CHECKED_BATCH) for model in models]


def ceilings(matrix_size: int, copied_bytes: int) -> list[Duel]:
    both = tuple((side, {}) for side in CEILING_SIDES)
    product = Duel("ceilings", {"what": "matrix product", "size": matrix_size}, both)
    return [product, Duel("ceilings", {"what": "copy", "size": copied_bytes}, both)]


def steps(model: str) -> list[Duel]:
    """Returns each remat policy paired with a setting of the peer, then each with the other forms of the loss."""
    form, *other_forms = LOSSES
    ours = [("clip_jax", {"remat": policy, "loss": form}) for policy in REMAT_POLICIES]
    theirs = [
        ("open_clip", {"compiled": compiled, "checkpointing": checkpointing})
        for compiled in (True, False)
        for checkpointing in (False, True)
    ]
    if model.startswith("RN"):
        theirs += [("open_clip", setting | {"channels_last": True}) for _, setting in theirs[:2]]
    duels = [tuple(filter(None, pair)) for pair in zip_longest(ours, theirs)]
    duels += [(("clip_jax", {"remat": policy, "loss": form}),) for form in other_forms for policy in REMAT_POLICIES]
    return [Duel("step", {"model": model}, duel, FIRST_BATCH.get(model, 128), LARGEST_BATCH) for duel in duels]


def choices(model: str, batch_size: int | None = None) -> list[Duel]:
    """Returns steps of clip_jax without the choices of ``clip_jax.models.execution``, at one batch size."""
    batch_size = batch_size or FIRST_BATCH.get(model, 128)
    without = ({"scan_unroll": 1}, {"fused_attention": False})
    settings = tuple(("clip_jax", {"remat": "lite", "loss": LOSSES[0]} | one) for one in without)
    return [Duel("step", {"model": model}, settings, batch_size, batch_size)]


def losses(pairs: int, width: int = 768) -> Duel:
    """Returns clip_jax's losses, also with other blocks, and open_clip's in bfloat16 (its default), TF32, float32."""
    ours = [("clip_jax", {"loss": form}) for form in LOSSES]
    ours += [("clip_jax", {"loss": "blockwise", "block_size": size}) for size in BLOCK_SIZES if size < pairs]
    theirs = [
        ("open_clip", {"compiled": compiled, "precision": precision})
        for precision in ("bfloat16", "tf32", "float32")
        for compiled in (False, True)
    ]
    settings = tuple(setting for pair in zip_longest(ours, theirs) for setting in pair if setting)
    return Duel("loss", {"pairs": pairs, "width": width}, settings)


def embeddings(model: str, batch_size: int) -> list[Duel]:
    """Returns embedding measurements; clip_jax in both precisions that ``clip_jax.load`` takes."""
    ours = [("clip_jax", {"precision": precision}) for precision in reversed(DTYPES)]
    theirs = [("open_clip", {"precision": "bfloat16", "compiled": compiled}) for compiled in (True, False)]
    settings = tuple(setting for pair in zip(ours, theirs, strict=True) for setting in pair)
    cases = ({"model": model, "input": kind} for kind in ("images", "texts"))
    return [Duel("embed", case, settings, batch_size, batch_size) for case in cases]


def starts(model: str, batch_size: int) -> list[Duel]:
    """Returns starts with empty compilation caches, and again with filled ones; PyTorch's eager form has no cache."""
    ours = ("clip_jax", {"remat": "none"})
    eager, compiled = (("open_clip", {"compiled": value, "checkpointing": False}) for value in (False, True))
    return [
        Duel("start", {"model": model, "caches": caches}, settings, batch_size, batch_size)
        for caches, settings in (("empty", (ours, eager, compiled)), ("filled", (ours, compiled)))
    ]


def next_batch(duel: Duel, tried: list[tuple[int | None, str]]) -> int | None:
    """Returns the batch size to try next, or 0 to stop; ``tried`` has (batch size, status) so far.

    Sizes double from the first until one does not fit. If the first does not fit, they halve until one does.
    """
    if not tried:
        return duel.first
    size, status = tried[-1]
    if not size:
        return 0
    if status == "does not fit" and all(status != "ok" for _, status in tried):
        return size // 2 if size // 2 >= min(SMALLEST_BATCH, duel.first) else 0
    if status == "ok" and all(status == "ok" for _, status in tried) and 2 * size <= duel.largest:
        return 2 * size
    return 0


def identity(spec: dict) -> str:
    """Returns a key that is equal for the same measurement in different runs."""
    return json.dumps([spec[name] for name in ("part", "side", "case", "setting")], sort_keys=True)


def measure_all(
    duels: Iterable[Duel],
    measure: Callable[[dict], dict],
    seconds_left: Callable[[], float],
    before: Iterable[dict] = (),
) -> Iterator[dict]:
    """Yields each measurement when it is done. When the time is over, yields "no time" for the next of each setting.

    A duel in which larger batches no longer help continues after all others. Measurements in ``before``, from another
    report, are not repeated, unless they failed or there was no time for them.
    """
    known = {identity(item): item for item in before if item["status"] in ("ok", "does not fit")}
    queue = deque((duel, [[] for _ in duel.settings]) for duel in duels)
    while queue:
        duel, histories = queue.popleft()
        going_on = False
        worth_it = not any(histories)
        for (side, setting), history in zip(duel.settings, histories, strict=True):
            batch_size = next_batch(duel, [(size, result["status"]) for size, result in history])
            if batch_size == 0:
                continue
            whole = dict(setting) if batch_size is None else {"batch_size": batch_size, **setting}
            spec = {"part": duel.part, "side": side, "case": duel.case, "setting": whole}
            result = known.get(identity(spec))
            if result is None:
                result = measure(spec) if seconds_left() >= LEAST_S else {"status": "no time"}
            history.append((batch_size, result))
            yield spec | result
            statuses = [(size, result["status"]) for size, result in history]
            going_on = going_on or next_batch(duel, statuses) != 0
            rates = [result["rate"] for _, result in history if result["status"] == "ok"]
            worth_it = worth_it or result["status"] != "ok" or len(rates) < 2 or rates[-1] > GAIN * rates[-2]
        if going_on:
            (queue.appendleft if worth_it else queue.append)((duel, histories))


# Running one measurement


def run_alone(spec: dict, deadline_s: float, environment: dict[str, str]) -> dict:
    """Returns the result of a measurement in its own process group, which is killed after ``deadline_s`` seconds."""
    spec = spec | {"started": time.time(), "finish_by": time.time() + 0.9 * deadline_s}
    command = [sys.executable, "-m", "benchmarks.accelerator_measurements", json.dumps(spec)]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:  # a pipe might outlive the process
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=errors, start_new_session=True
        )
        try:
            process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            return {"status": f"failed: not done within {deadline_s:.0f} s"}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # also its child processes, such as compilers
                process.wait()
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append([line for line in file.read().decode(errors="replace").splitlines() if line.strip()])
    lines, messages = texts
    with contextlib.suppress(ValueError, IndexError):
        result = json.loads(lines[-1])
        if isinstance(result, dict) and "status" in result:
            return result
    code = process.returncode
    ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return {"status": f"failed: {ended}: {messages[-1].strip()[:200] if messages else 'without a message'}"}


class Bench:
    """Measures within a budget of seconds (None: unlimited), with the environment and caches of the whole run."""

    def __init__(self, small: bool, seconds: float | None, caches: pathlib.Path):
        self._end = None if seconds is None else time.monotonic() + seconds
        self._caches = caches
        self._shared = {"rounds": 3, "round_limit_s": 0.5} if small else {"rounds": 20, "round_limit_s": 20.0}
        self.environment = ENVIRONMENT | (SMALL_ENVIRONMENT if small else {}) | os.environ
        self.found: dict = {}

    def seconds_left(self) -> float:
        return float("inf") if self._end is None else self._end - time.monotonic()

    def probe(self) -> dict:
        """Returns devices, versions and missing peers; its status is not "ok" if JAX does not work."""
        spec = {"part": "probe", "side": "clip_jax", "case": {}, "setting": {}}
        both = self.environment | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # leaves memory for PyTorch
        self.found = run_alone(spec, DEADLINE_S, both)
        return self.found

    def measure(self, spec: dict) -> dict:
        if spec["side"] in self.found["missing"]:
            return {"status": self.found["missing"][spec["side"]]}
        environment, start = dict(self.environment), time.monotonic()
        if spec["part"] == "start":
            kind = "compiled" if spec["setting"].get("compiled") else "plain"
            folder = self._caches / spec["case"]["model"].replace("/", "-") / f"{spec['side']}-{kind}"
            environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "jax")
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        else:
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        deadline = min(DEADLINE_S, self.seconds_left())
        extra = self._shared | {"platform": self.found["device"]["platform"]}
        if spec["side"] == "open_clip" and "model" in spec["case"]:
            extra |= open_clip_model(spec["case"]["model"])
        result = run_alone(spec | extra, deadline, environment)
        if deadline < DEADLINE_S and result["status"].startswith("failed: not done"):
            result = {"status": "no time"}  # with more time it might have finished
        return result | {"process_seconds": round(time.monotonic() - start, 1)}


def open_clip_model(name: str) -> dict:
    """Returns open_clip's config of a preset, and the pixels' mean and std: its process need not import JAX."""
    from clip_jax.models.preprocessing import IMAGE_MEAN, IMAGE_STD
    from clip_jax.weights.open_clip import config_of

    config = config_of(model_preset(default_config(name)))["model_cfg"]
    return {"model_cfg": config, "mean": IMAGE_MEAN, "std": IMAGE_STD}


def refusal(platform: str, small: bool) -> str | None:
    """Returns why nothing can be measured, or None."""
    if platform == "cpu" and not small:
        return "JAX finds only a CPU and no accelerator; --small runs the benchmark on it at small sizes"
    return None


def finish(report: dict, measurements: list[dict], minutes_used: float) -> dict:
    """Returns the report with the measurements so far."""
    measurements = with_shares(measurements)
    return report | {
        "minutes_used": round(minutes_used, 2),
        "measurements": measurements,
        "left_out": [describe(item) for item in measurements if item["status"] == "no time"],
        "summary": summarize(measurements),
    }


def missing(found: dict) -> list[str]:
    """Returns a line for each thing that is missing on this machine."""
    lines = []
    if found["device"]["platform"] == "cpu":
        lines.append("no accelerator: a CPU at small sizes tests the benchmark, and its figures mean nothing")
    lines += [f"{side}: {status}" for side, status in found["missing"].items()]
    if found["device"]["count"] > 1:
        lines.append(f"JAX sees {found['device']['count']} devices: training and the loss are measured on one")
    return lines


def header_of(bench: Bench, typed: list[str]) -> dict:
    """Returns the first fields of the report: when, how and on what it was measured; ``typed`` are the arguments."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.accelerator", *typed]),
        "device": bench.found["device"],
        "versions": bench.found["versions"],
        "environment": {name: bench.environment[name] for name in REPORTED_ENVIRONMENT if name in bench.environment},
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--models", default=",".join(MODELS), help="presets, the most important first")
    parser.add_argument("--minutes", type=float, help="limit of wall time in minutes; default: none")
    parser.add_argument(
        "--small", action="store_true", help="a tiny model and tiny sizes: all parts on a CPU in minutes"
    )
    parser.add_argument("--resume", action="store_true", help="keep the measurements of the report at --output")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/accelerator.json"))
    parser.add_argument("--table", type=pathlib.Path, metavar="REPORT", help="print the tables of a report and stop")
    typed = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(typed)
    if options.table:
        print(tables(json.loads(options.table.read_text())), end="")
        return 0
    parts, models, start = options.only.split(","), options.models.split(","), time.monotonic()
    for name, values, known in (("only", parts, PARTS), ("models", models, PRESETS)):
        if unknown := set(values) - set(known):
            parser.error(f"--{name}: unknown {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    with tempfile.TemporaryDirectory() as caches:
        seconds = options.minutes and 60 * options.minutes
        before = json.loads(options.output.read_text()) if options.resume and options.output.exists() else {}
        bench = Bench(options.small, seconds, pathlib.Path(caches))
        found = bench.probe()
        if found["status"] != "ok":
            print(f"JAX does not start: {found['status']}", file=sys.stderr)
            return 2
        if reason := refusal(found["device"]["platform"], options.small):
            print(reason, file=sys.stderr)
            return 2
        for name in ("device", "versions"):
            if before and before[name] != found[name]:
                print(f"--resume: {options.output} was measured with another {name}: {before[name]}", file=sys.stderr)
                return 2
        report = header_of(bench, typed) | {"small": options.small, "minutes": options.minutes}
        report["missing"] = missing(found)
        for line in report["missing"]:
            print(line, file=sys.stderr)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        measurements: list[dict] = []
        duels = plan(parts, models, options.small)
        for item in measure_all(duels, bench.measure, bench.seconds_left, before.get("measurements", ())):
            print(progress(item), file=sys.stderr, flush=True)
            measurements.append(item)
            # The report is written each time because a device may be taken away at any time.
            done = {identity(item) for item in measurements}
            kept = [item for item in before.get("measurements", ()) if identity(item) not in done]
            whole = finish(report, kept + measurements, (time.monotonic() - start) / 60)
            options.output.write_text(json.dumps(whole, indent=1) + "\n")
    print(tables(whole), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
