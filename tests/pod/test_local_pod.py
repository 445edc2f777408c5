"""Several processes and devices train as one does."""

import subprocess
import sys

import numpy as np
import pytest
from trial import DEADLINE, REPOSITORY, SMALL, environment, losses, run

STEPS = "--config.steps=6"


def run_pod(processes: int, devices: int, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable,
            "launch/local_pod.py",
            f"--processes={processes}",
            f"--devices={devices}",
            "--grace=5",
            "--",
            *arguments,
        ],
        cwd=REPOSITORY,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=DEADLINE,
        check=False,
    )


@pytest.fixture(scope="module")
def one_device(tmp_path_factory) -> dict[int, float]:
    workdir = tmp_path_factory.mktemp("one_device")
    run(*SMALL, STEPS, f"--workdir={workdir}")
    return losses(workdir)


def assert_close(curve: dict[int, float], reference: dict[int, float]) -> None:
    assert curve.keys() == reference.keys()
    np.testing.assert_allclose([curve[step] for step in curve], [reference[step] for step in curve], rtol=2e-5)


@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_eight_devices_give_the_loss_curve_of_one(one_device, tmp_path, fsdp):
    run(*SMALL, STEPS, f"--config.mesh.fsdp={fsdp}", f"--workdir={tmp_path}", devices=8)
    assert_close(losses(tmp_path), one_device)


def test_a_pod_of_two_processes_gives_the_loss_curve_of_one_and_resumes_alone(one_device, tmp_path):
    pod = run_pod(2, 2, *SMALL, STEPS, "--config.mesh.fsdp=2", "--config.checkpoint_every=3", f"--workdir={tmp_path}")
    assert pod.returncode == 0, pod.stdout
    assert_close(losses(tmp_path), one_device)
    # The same folder on one device: as if the run had been stopped after its third step.
    subprocess.run(["rm", "-r", tmp_path / "checkpoints" / "6"], check=True)
    output = run(*SMALL, STEPS, "--config.mesh.fsdp=1", f"--workdir={tmp_path}")
    assert "resumed at step 3 of 6" in output
    assert_close(losses(tmp_path), one_device)


def test_a_mistake_ends_every_process_of_a_pod_with_exit_code_2(tmp_path):
    pod = run_pod(2, 1, *SMALL, STEPS, "--config.data.source=folder:/not/there", f"--workdir={tmp_path}/run")
    assert pod.returncode == 2
    assert "no folder /not/there" in pod.stdout
    assert "Traceback" not in pod.stdout
    assert not (tmp_path / "run").exists()
