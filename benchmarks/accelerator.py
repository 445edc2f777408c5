"""One accelerator: training, the loss, embedding and starting, here and in open_clip (PyTorch), on the same device.

python -m benchmarks.accelerator [--only=check,ceilings,step,loss,embed,start] [--models=ViT-L/14] [--minutes=N]
    [--resume] [--small] [--output=runs/accelerator.json]
python -m benchmarks.accelerator --table=runs/accelerator.json

Random data. Each measurement has a process of its own with a deadline, warms up, and takes the median of rounds that
end when the device is done; ours and open_clip's take turns. Batches double until one does not fit. Ours is measured
with each remat policy and form of the loss, and without what :mod:`clip_jax.models.execution` chose for the device;
open_clip's with and without compiling and gradient checkpointing.
Before all, one step with cuDNN's attention is compared with one without. Tables go to stdout, and all of it to a JSON
report, which is written anew after each measurement. With ``--minutes`` the most important comes first, and what was
left out is listed; with ``--resume`` a later run goes on from there. ``--small`` tries everything at sizes for a CPU.
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
    summarise,
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
LOSSES = tuple(form for form in FORMS if form != "auto")  # which is one of the others
BLOCK_SIZES = (1_024, 4_096, 16_384)  # beside the one that clip_jax.models.execution chose
SMALLEST_BATCH = 8
CHECKED_BATCH = 8
SMALL_MODEL = "ViT-tiny"
DEADLINE_S = 420  # of one measurement; compiling the largest model takes the most of it
LEAST_S = 15  # with less time left nothing is started
GAIN = 1.03  # a batch twice as large that brings less than this can wait for the rest
REPOSITORY = pathlib.Path(__file__).parent.parent

# By default JAX leaves a quarter of the memory alone.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    "CUDA_VISIBLE_DEVICES": "0",
}
SMALL_ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # compiling would take nearly all of the time
REPORTED_ENVIRONMENT = (
    *ENVIRONMENT,
    *SMALL_ENVIRONMENT,
    "XLA_FLAGS",
    "JAX_PLATFORMS",
    "LIBTPU_INIT_ARGS",
    "PYTORCH_CUDA_ALLOC_CONF",
)


class Duel(NamedTuple):
    """Settings of both sides that take turns on one ``case``, with batches that double from ``first`` to ``largest``.

    ``settings`` are (side, setting); ``first`` is None where there is no batch.
    """

    part: str
    case: dict
    settings: tuple[tuple[str, dict], ...]
    first: int | None = None
    largest: int = 0


# What is measured, in which order


def plan(parts: Iterable[str], models: Iterable[str] = MODELS, small: bool = False) -> list[Duel]:
    """All duels of these parts and models, the most important first."""
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
    """Each part of each side once, at sizes that a CPU does in seconds; PyTorch compiles, which is slow there, once."""
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
    """What no other measurement would notice: that cuDNN's attention trains as the written one does."""
    return [Duel("check", {"model": model}, (("clip_jax", {}),), CHECKED_BATCH, CHECKED_BATCH) for model in models]


def ceilings(matrix_size: int, copied_bytes: int) -> list[Duel]:
    both = tuple((side, {}) for side in CEILING_SIDES)
    product = Duel("ceilings", {"what": "matrix product", "size": matrix_size}, both)
    return [product, Duel("ceilings", {"what": "copy", "size": copied_bytes}, both)]


def steps(model: str) -> list[Duel]:
    """Each remat policy beside a setting of the peer, then each with the other forms of the loss."""
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
    """Ours without what ``clip_jax.models.execution`` chose for the device, at one batch size."""
    batch_size = batch_size or FIRST_BATCH.get(model, 128)
    taken_back = ({"scan_unroll": 1}, {"fused_attention": False})
    settings = tuple(("clip_jax", {"remat": "lite", "loss": LOSSES[0]} | one) for one in taken_back)
    return [Duel("step", {"model": model}, settings, batch_size, batch_size)]


def losses(pairs: int, width: int = 768) -> Duel:
    """Ours as it trains, with other blocks too; open_clip's with similarities in bfloat16, as it trains, and better."""
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
    """Ours in both precisions that ``clip_jax.load`` takes."""
    ours = [("clip_jax", {"precision": precision}) for precision in reversed(DTYPES)]
    theirs = [("open_clip", {"precision": "bfloat16", "compiled": compiled}) for compiled in (True, False)]
    settings = tuple(setting for pair in zip(ours, theirs, strict=True) for setting in pair)
    cases = ({"model": model, "input": kind} for kind in ("images", "texts"))
    return [Duel("embed", case, settings, batch_size, batch_size) for case in cases]


def starts(model: str, batch_size: int) -> list[Duel]:
    """With empty compilation caches, and once more with what that left in them; PyTorch's eager form has none."""
    ours = ("clip_jax", {"remat": "none"})
    eager, compiled = (("open_clip", {"compiled": value, "checkpointing": False}) for value in (False, True))
    return [
        Duel("start", {"model": model, "caches": caches}, settings, batch_size, batch_size)
        for caches, settings in (("empty", (ours, eager, compiled)), ("filled", (ours, compiled)))
    ]


def next_batch(duel: Duel, tried: list[tuple[int | None, str]]) -> int | None:
    """The batch size to try next of (batch size, status) so far; 0 where there is no more.

    Sizes double from the first until one does not fit. Where not even the first fits they halve until one does.
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
    """The same for the same measurement of this and of another run."""
    return json.dumps([spec[name] for name in ("part", "side", "case", "setting")], sort_keys=True)


def measure_all(
    duels: Iterable[Duel],
    measure: Callable[[dict], dict],
    seconds_left: Callable[[], float],
    before: Iterable[dict] = (),
) -> Iterator[dict]:
    """Yields each measurement as it is done, or as "no time" for the next of each setting when the time is over.

    A duel whose larger batches bring nothing any more goes on when all others are through. What is among ``before``,
    the measurements of another report, is not measured again, unless it failed or there was no time for it.
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
    """The result of a measurement in a process group of its own, which is ended when its time is over."""
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
                os.killpg(process.pid, signal.SIGKILL)  # also what it started: compilers
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
    """Measures within a budget of seconds, None for no end, with the environment and caches of the whole run."""

    def __init__(self, small: bool, seconds: float | None, caches: pathlib.Path):
        self._end = None if seconds is None else time.monotonic() + seconds
        self._caches = caches
        self._shared = {"rounds": 3, "round_limit_s": 0.5} if small else {"rounds": 20, "round_limit_s": 20.0}
        self.environment = ENVIRONMENT | (SMALL_ENVIRONMENT if small else {}) | os.environ
        self.found: dict = {}

    def seconds_left(self) -> float:
        return float("inf") if self._end is None else self._end - time.monotonic()

    def probe(self) -> dict:
        """Asks what there is; the result's status is not "ok" where not even JAX works."""
        spec = {"part": "probe", "side": "clip_jax", "case": {}, "setting": {}}
        both = self.environment | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # so that PyTorch finds memory beside JAX
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
            result = {"status": "no time"}  # it might have been done with more
        return result | {"process_seconds": round(time.monotonic() - start, 1)}


def open_clip_model(name: str) -> dict:
    """open_clip's config of a preset, and the pixels' mean and standard deviation: its process need not import JAX."""
    from clip_jax.models.preprocessing import IMAGE_MEAN, IMAGE_STD
    from clip_jax.weights.open_clip import config_of

    config = config_of(model_preset(default_config(name)))["model_cfg"]
    return {"model_cfg": config, "mean": IMAGE_MEAN, "std": IMAGE_STD}


def refusal(platform: str, small: bool) -> str | None:
    """Why nothing is measured, or None."""
    if platform == "cpu" and not small:
        return "JAX sees no accelerator here, only a CPU: --small tries the benchmark on it at small sizes"
    return None


def finish(report: dict, measurements: list[dict], minutes_used: float) -> dict:
    """The report with what has been measured so far."""
    measurements = with_shares(measurements)
    return report | {
        "minutes_used": round(minutes_used, 2),
        "measurements": measurements,
        "left_out": [describe(item) for item in measurements if item["status"] == "no time"],
        "summary": summarise(measurements),
    }


def missing(found: dict) -> list[str]:
    """A line for each thing that is not here."""
    lines = []
    if found["device"]["platform"] == "cpu":
        lines.append("no accelerator: a CPU at small sizes, a trial of the benchmark and no figure of anything")
    lines += [f"{side}: {status}" for side, status in found["missing"].items()]
    if found["device"]["count"] > 1:
        lines.append(f"JAX sees {found['device']['count']} devices: training and the loss are measured on one")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--models", default=",".join(MODELS), help="presets, the most important first")
    parser.add_argument("--minutes", type=float, help="of wall time; without it, as long as it takes")
    parser.add_argument(
        "--small", action="store_true", help="a tiny model and tiny sizes: all parts on a CPU in minutes"
    )
    parser.add_argument("--resume", action="store_true", help="keep what the report at --output has already")
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
            parser.error(f"--{name}: there is no {', '.join(sorted(unknown))}, but {', '.join(known)}")
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
                print(f"--resume: {options.output} is of another {name}: {before[name]}", file=sys.stderr)
                return 2
        report = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", "benchmarks.accelerator", *typed]),
            "device": found["device"],
            "versions": found["versions"],
            "environment": {
                name: bench.environment[name] for name in REPORTED_ENVIRONMENT if name in bench.environment
            },
            "small": options.small,
            "minutes": options.minutes,
            "missing": missing(found),
        }
        for line in report["missing"]:
            print(line, file=sys.stderr)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        measurements: list[dict] = []
        duels = plan(parts, models, options.small)
        for item in measure_all(duels, bench.measure, bench.seconds_left, before.get("measurements", ())):
            print(progress(item), file=sys.stderr, flush=True)
            measurements.append(item)
            # A device may be taken away at any time: what has been measured stays.
            done = {identity(item) for item in measurements}
            kept = [item for item in before.get("measurements", ()) if identity(item) not in done]
            whole = finish(report, kept + measurements, (time.monotonic() - start) / 60)
            options.output.write_text(json.dumps(whole, indent=1) + "\n")
    print(tables(whole), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
