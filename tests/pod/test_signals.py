"""A signal to one host of a pod ends all of them with exit code 3, and unshared folders are refused on all."""

import signal
import time

import pytest
from trial import SMALL, finish, kill, pod_variables, start, wait_for_step

ENDLESS = ["--config.steps=100000", "--config.checkpoint_every=3", "--config.log_every=1"]
EVALUATING = ["--config.eval_every=2", "--config.evaluation.tasks=emoji_unseen_both"]


def start_two(*folders: str, arguments: list[str]) -> list:
    return [
        start(*SMALL, *ENDLESS, *arguments, f"--workdir={folder}", **variables)
        for folder, variables in zip(folders, pod_variables(2), strict=True)
    ]


def finish_all(hosts: list) -> list[str]:
    try:
        return [finish(host) for host in hosts]
    finally:
        for host in hosts:
            kill(host)


@pytest.mark.parametrize(
    ("signaled", "number", "arguments"),
    [
        (1, signal.SIGTERM, EVALUATING),
        pytest.param(0, signal.SIGINT, [], marks=pytest.mark.slow),
        pytest.param(1, signal.SIGINT, EVALUATING, marks=pytest.mark.slow),
    ],
)
def test_all_hosts_save_and_stop_at_the_same_step(tmp_path, signaled, number, arguments):
    hosts = start_two(tmp_path, tmp_path, arguments=arguments)
    wait_for_step(hosts[0], 4)
    hosts[signaled].send_signal(number)
    output = finish_all(hosts)
    assert [host.returncode for host in hosts] == [3, 3], output
    [stopped] = [line for line in output[0].splitlines() if line.startswith("stopped at step")]
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert int(stopped.split()[3]) == max(saved)


@pytest.mark.slow
@pytest.mark.parametrize("signaled", [0, 1])
def test_a_signal_before_the_first_step_ends_all_hosts(tmp_path, signaled):
    hosts = start_two(tmp_path, tmp_path, arguments=[])
    deadline = time.monotonic() + 60
    while not (tmp_path / "lock.json").exists():  # all have joined the pod
        assert time.monotonic() < deadline
        time.sleep(0.01)
    hosts[signaled].send_signal(signal.SIGTERM)
    output = finish_all(hosts)
    assert [host.returncode for host in hosts] == [3, 3], output
    assert "interrupted; what the last checkpoint holds is safe" in output[signaled]
    assert f"interrupted: a signal has ended host {signaled}" in output[1 - signaled]


@pytest.mark.slow
def test_a_folder_that_the_hosts_do_not_share_is_refused(tmp_path):
    hosts = start_two(tmp_path / "one", tmp_path / "two", arguments=[])
    for output in finish_all(hosts):
        assert "is not the same folder on all hosts" in output and "Traceback" not in output
    assert [host.returncode for host in hosts] == [2, 2]
