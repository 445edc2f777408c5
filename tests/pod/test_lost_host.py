"""A host of a pod may be lost at any moment: the others say which and leave, and the run goes on on any number."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from trial import (
    REPOSITORY,
    SMALL,
    assert_same_curve,
    environment,
    finish,
    kill,
    losses,
    pod_variables,
    start,
    wait_for_step,
)

STEPS = "--config.steps=40"
OFTEN = "--config.checkpoint_every=10"


def start_hosts(processes: int, workdir: pathlib.Path) -> list[subprocess.Popen]:
    """A pod as nothing holds it together but itself: no launcher."""
    arguments = [*SMALL, STEPS, OFTEN, f"--workdir={workdir}"]
    return [start(*arguments, **variables) for variables in pod_variables(processes)]


def run_pod(processes: int, workdir: pathlib.Path) -> str:
    """Runs a pod to its end; returns what its first host printed."""
    hosts = start_hosts(processes, workdir)
    try:
        outputs = [finish(host) for host in hosts]
    finally:
        for host in hosts:
            kill(host)
    assert [host.returncode for host in hosts] == [0] * processes, outputs
    assert not any("gone" in output for output in outputs)
    return outputs[0]


def assert_goes_on(output: str, workdir: pathlib.Path, said: str, undisturbed: pathlib.Path) -> None:
    """The run went on from the step that the line has named, and its curve is that of an undisturbed one."""
    [step] = re.findall(r"goes on from its last checkpoint \(step (\d+)\)", said)
    assert f"resumed at step {step} of 40" in output
    assert_same_curve(losses(workdir), losses(undisturbed))


# It takes 25 seconds until a host counts as lost. The test of watched hosts below uses 4.
@pytest.mark.slow
def test_a_pod_names_its_lost_host_and_goes_on_started_again(undisturbed, tmp_path):
    launcher = [sys.executable, "launch/local_pod.py", "--processes=2", "--devices=1", "--", *SMALL, STEPS, OFTEN]
    pod = subprocess.Popen(
        [*launcher, f"--workdir={tmp_path}"],
        cwd=REPOSITORY,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    hosts = []
    try:
        wait_for_step(pod, 15)
        hosts = [int(pid) for pid in pathlib.Path(f"/proc/{pod.pid}/task/{pod.pid}/children").read_text().split()]
        os.kill(hosts[1], signal.SIGKILL)
        output = pod.communicate(timeout=60)[0]
    finally:
        pod.kill()
        for host in hosts:
            with contextlib.suppress(ProcessLookupError):
                os.kill(host, signal.SIGKILL)
    assert pod.returncode == 128 + signal.SIGKILL, output
    assert "process 1 has ended by SIGKILL" in output
    [said] = [line for line in output.splitlines() if "gone" in line]
    assert said.startswith(f"failed: host 1 of 2 ({socket.gethostname()}) is gone; start all hosts again")
    assert "Traceback" not in output and "stack trace" not in output
    assert_goes_on(run_pod(2, tmp_path), tmp_path, said, undisturbed)


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_others_leave_host_0_too_and_half_or_twice_as_many_go_on(undisturbed, tmp_path, processes):
    first, second = start_hosts(2, tmp_path)
    try:
        wait_for_step(first, 15)
        kill(first)
        output = second.communicate(timeout=60)[0]
    finally:
        kill(first)
        kill(second)
    assert second.returncode == 1, output
    said = output.splitlines()[-1]
    assert said.startswith("failed: host 0 of 2 (127.0.0.1:")
    assert "Traceback" not in output
    assert_goes_on(run_pod(processes, tmp_path), tmp_path, said, undisturbed)


def start_watched_hosts(seconds: list[float], folder: pathlib.Path) -> list[subprocess.Popen]:
    """Hosts that take a silence of 4 seconds for a loss; returns once all are watched."""
    hosts = [
        subprocess.Popen(
            [sys.executable, "tests/helpers/watched_host.py", str(busy), folder],
            cwd=REPOSITORY,
            env=environment() | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for busy, variables in zip(seconds, pod_variables(len(seconds)), strict=True)
    ]
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < len(hosts):
        assert time.monotonic() < deadline, "the hosts did not start"
        time.sleep(0.1)
    return hosts


# A stopped process is as a machine that has lost its network: no connection is closed.
@pytest.mark.parametrize(
    ("lost", "number"),
    [
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
        (2, signal.SIGSTOP),
        (0, signal.SIGKILL),
    ],
)
def test_a_host_lost_while_others_have_finished_is_named_by_all(tmp_path, lost, number):
    hosts = start_watched_hosts([60, 0, 60], tmp_path)
    try:
        hosts[lost].send_signal(number)
        others = [host for index, host in enumerate(hosts) if index != lost]
        outputs = [host.communicate(timeout=30)[0] for host in others]
    finally:
        for host in hosts:
            kill(host)
    assert [host.returncode for host in others] == [1, 1], outputs
    for output in outputs:
        said = output.splitlines()[-1]
        assert said.startswith(f"failed: host {lost} of 3 (")
        assert said.endswith("goes on from its start, as it has no checkpoint yet")


@pytest.mark.slow
def test_hosts_that_end_far_apart_do_not_take_each_other_for_lost(tmp_path):
    hosts = start_watched_hosts([8, 0, 4], tmp_path)
    outputs = [finish(host) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0, 0]
    assert outputs == ["", "", ""]
