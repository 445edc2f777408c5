"""Several processes and devices train as one does."""

import subprocess

import pytest
from trial import DEADLINE, REPOSITORY, SMALL, assert_same_curve, environment, losses, run, wait_for_step
from warm_python import warm_python

STEPS = "--config.steps=40"


def start_pod(processes: int, devices: int, *arguments: str) -> subprocess.Popen:
    launcher = ["launch/local_pod.py", f"--processes={processes}", f"--devices={devices}", "--grace=20", "--"]
    return subprocess.Popen(
        [warm_python(), *launcher, *arguments],
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


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_eight_devices_give_the_loss_curve_of_one(undisturbed, tmp_path, fsdp):
    run(*SMALL, STEPS, f"--config.mesh.fsdp={fsdp}", f"--workdir={tmp_path}", devices=8)
    assert_same_curve(losses(tmp_path), losses(undisturbed))


def test_a_pod_gives_the_loss_curve_of_one_device_saves_together_on_sigterm_and_resumes_alone(undisturbed, tmp_path):
    pod = start_pod(2, 2, *SMALL, STEPS, "--config.mesh.fsdp=2", f"--workdir={tmp_path}")
    wait_for_step(pod, 6)
    pod.terminate()
    output = finish_pod(pod)
    assert pod.returncode == 3, output
    assert "gone" not in output
    [stopped] = [line for line in output.splitlines() if line.startswith("stopped at step")]
    step = int(stopped.split()[3])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(step)]
    assert len(losses(tmp_path)) == step
    # The same folder on one device.
    output = run(*SMALL, STEPS, "--config.mesh.fsdp=1", f"--workdir={tmp_path}")
    assert f"resumed at step {step} of 40" in output
    assert_same_curve(losses(tmp_path), losses(undisturbed))


def test_a_mistake_ends_every_process_of_a_pod_with_exit_code_2(tmp_path):
    pod = start_pod(2, 1, *SMALL, STEPS, "--config.data.source=folder:/not/there", f"--workdir={tmp_path}/run")
    output = finish_pod(pod)
    assert pod.returncode == 2
    assert "no folder /not/there" in output
    assert "Traceback" not in output and "gone" not in output
    assert not (tmp_path / "run").exists()
