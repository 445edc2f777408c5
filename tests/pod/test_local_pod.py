"""Several processes and devices train as one does."""

import subprocess
import sys

import numpy as np
import pytest
from trial import DEADLINE, REPOSITORY, SMALL, environment, losses, run, wait_for_step

STEPS = "--config.steps=6"


def start_pod(processes: int, devices: int, *arguments: str) -> subprocess.Popen:
    launcher = ["launch/local_pod.py", f"--processes={processes}", f"--devices={devices}", "--grace=20", "--"]
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        cwd=REPOSITORY,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish_pod(pod: subprocess.Popen) -> str:
    """All that the pod still prints; the launcher ends its processes if it is ended itself."""
    try:
        return pod.communicate(timeout=DEADLINE)[0]
    finally:
        pod.terminate()


@pytest.fixture(scope="module")
def one_device(tmp_path_factory) -> dict[int, float]:
    workdir = tmp_path_factory.mktemp("one_device")
    run(*SMALL, STEPS, f"--workdir={workdir}")
    return losses(workdir)


def assert_close(curve: dict[int, float], reference: dict[int, float]) -> None:
    assert curve.keys() == reference.keys()
    np.testing.assert_allclose([curve[step] for step in curve], [reference[step] for step in curve], rtol=2e-5)


@pytest.mark.parametrize("fsdp", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)])
def test_eight_devices_give_the_loss_curve_of_one(one_device, tmp_path, fsdp):
    run(*SMALL, STEPS, f"--config.mesh.fsdp={fsdp}", f"--workdir={tmp_path}", devices=8)
    assert_close(losses(tmp_path), one_device)


def test_a_pod_of_two_processes_gives_the_loss_curve_of_one_and_resumes_alone(one_device, tmp_path):
    every = "--config.checkpoint_every=3"
    pod = start_pod(2, 2, *SMALL, STEPS, "--config.mesh.fsdp=2", every, f"--workdir={tmp_path}")
    output = finish_pod(pod)
    assert pod.returncode == 0, output
    assert "gone" not in output
    assert_close(losses(tmp_path), one_device)
    # The same folder on one device: as if the run had been stopped after its third step.
    subprocess.run(["rm", "-r", tmp_path / "checkpoints" / "6"], check=True)
    output = run(*SMALL, STEPS, "--config.mesh.fsdp=1", f"--workdir={tmp_path}")
    assert "resumed at step 3 of 6" in output
    assert_close(losses(tmp_path), one_device)


def test_a_sigterm_to_a_pod_saves_on_all_hosts_at_the_same_step(tmp_path):
    many = "--config.steps=4000"
    pod = start_pod(2, 1, *SMALL, many, f"--workdir={tmp_path}")
    wait_for_step(pod, 3)
    pod.terminate()
    output = finish_pod(pod)
    assert pod.returncode == 3, output
    assert "gone" not in output
    [stopped] = [line for line in output.splitlines() if line.startswith("stopped at step")]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [stopped.split()[3]]


def test_a_mistake_ends_every_process_of_a_pod_with_exit_code_2(tmp_path):
    pod = start_pod(2, 1, *SMALL, STEPS, "--config.data.source=folder:/not/there", f"--workdir={tmp_path}/run")
    output = finish_pod(pod)
    assert pod.returncode == 2
    assert "no folder /not/there" in output
    assert "Traceback" not in output and "gone" not in output
    assert not (tmp_path / "run").exists()
