"""A training small enough to run in seconds, for the tests that start whole processes."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import time
from importlib.metadata import version

import numpy as np
from warm_python import warm_python

REPOSITORY = pathlib.Path(__file__).parent.parent.parent
GIVEN_CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR")  # of compiled programs; the tests make one otherwise
DEADLINE = 300  # seconds; whatever takes longer is killed
# Compilation is most of the time of most tests. XLA's older emitters of loops compile 2.5 times as fast; in newer
# versions than the locked one they crash. One module for the whole program takes a fifth less time than 32 for the
# threads of a machine whose cores are busy with other tests.
QUICK_COMPILATION = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if version("jaxlib").startswith("0.10.")
    else ""
)

SMALL = [
    "--config=configs/quickstart.py",
    "--config.global_batch_size=16",
    "--config.log_every=1",
    "--config.eval_every=0",
    "--config.data.num_workers=0",
    "--config.evaluation.tasks=",
    "--config.mesh.fsdp=1",  # what a CPU gets, without counting the model's bytes
    "--config.model.embed_dim=16",
    "--config.model.vision.image_size=16",
    "--config.model.vision.patch_size=8",
    "--config.model.vision.width=16",
    "--config.model.vision.num_layers=1",
    "--config.model.vision.num_heads=2",
    "--config.model.text.width=8",
    "--config.model.text.num_layers=1",
    "--config.model.text.num_heads=1",
]


def environment(devices: int = 1) -> dict[str, str]:
    """The variables of a process with so many CPU devices, whatever this one has."""
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILATION}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(REPOSITORY),
    }


def pod_variables(processes: int) -> list[dict[str, str]]:
    """What makes each process one of a pod."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [shared | {"JAX_PROCESS_ID": str(index)} for index in range(processes)]


def start(
    *arguments: str, devices: int = 1, module: str = "clip_jax.main", python: str = "", **variables: str
) -> subprocess.Popen:
    """Starts ``python -m MODULE`` in a process group of its own, with more variables in its environment.

    Unless ``python`` names an interpreter, what is returned is the client of ``warm_python``: SIGHUP, SIGINT and
    SIGTERM go to the training and its workers, SIGKILL ends them, and other signals do not reach them.
    """
    return subprocess.Popen(
        [python or warm_python(), "-m", module, *arguments],
        cwd=REPOSITORY,
        env=environment(devices) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    """All that the process still prints; kills it and what it started if it doesn't end in time."""
    try:
        return process.communicate(timeout=DEADLINE)[0]
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """``kill -9`` for the process and everything that it started. All have ended when it returns."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
    if process.stdout and not process.stdout.closed:
        process.stdout.read()  # to the end, which comes when the last process that could write to it has ended


def run(*arguments: str, devices: int = 1) -> str:
    """Runs a training to its end and returns what it printed."""
    process = start(*arguments, devices=devices)
    output = finish(process)
    assert process.returncode == 0, output
    return output


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    """Reads the output until the log shows this step."""
    deadline = time.monotonic() + DEADLINE
    for line in process.stdout:
        words = line.split()
        if words[:1] == ["step"] and int(words[1].split("/")[0]) >= step:
            return
        assert time.monotonic() < deadline
    raise AssertionError(f"the training ended before step {step}")


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """The loss of each step, bit for bit; of a step that was run twice, the later one."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def assert_same_curve(curve: dict[int, float], reference: dict[int, float]) -> None:
    """The same steps, and the same losses but for what rounding makes of sums in another order."""
    assert curve.keys() == reference.keys()
    np.testing.assert_allclose([curve[step] for step in curve], [reference[step] for step in curve], rtol=2e-5)
