"""The launcher of a pod on one machine ends with the code of the first process that failed, and leaves none behind."""

import importlib.util
import pathlib
import signal
import subprocess

FILE = pathlib.Path(__file__).parent.parent.parent / "launch" / "local_pod.py"


def test_the_first_failure_is_named_and_the_others_are_killed_after_their_grace(capsys):
    spec = importlib.util.spec_from_file_location("local_pod", FILE)
    local_pod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(local_pod)
    pod = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    pod[1].kill()
    assert local_pod.wait(pod, grace=0.1) == -signal.SIGKILL
    assert "process 1 has ended by SIGKILL" in capsys.readouterr().err
    assert [process.returncode for process in pod] == [-signal.SIGKILL] * 2
