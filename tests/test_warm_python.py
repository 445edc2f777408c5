"""A process that is forked from the server of ``warm_python`` is what one of its own would be."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from trial import environment
from warm_python import warm_python

REPORT = """
import json, os, sys, time
import module_of_the_test
print(json.dumps([sys.argv, os.getcwd(), os.environ["NAME"], sys.stdin.read(), os.getpid()]), flush=True)
print("to errors", file=sys.stderr)
"""


@pytest.fixture
def start(tmp_path):
    """A function that starts a program with more lines than ``REPORT``, forked or by an interpreter of its own."""
    (tmp_path / "module_of_the_test.py").touch()
    started = []

    def start(more: str, *words: str, python: str = "", **variables: str) -> subprocess.Popen:
        (tmp_path / "program.py").write_text(REPORT + more)
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        variables = environment() | {"NAME": "a\nb", "PYTHONPATH": str(tmp_path)} | variables
        words = words or ("-m", "program", "x y", "\1")
        process = subprocess.Popen([python or warm_python(), *words], cwd=tmp_path, env=variables, text=True, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def ended(process: subprocess.Popen) -> tuple:
    output, errors = process.communicate("typed", timeout=60)
    words, *others, pid = json.loads(output)
    assert pid != process.pid or "/clip_jax_python_" not in process.args[0]
    return process.returncode, words, others, errors


@pytest.mark.parametrize("more", ["", "sys.exit(3)", "sys.exit('a line')", "raise ValueError('a line')"])
def test_it_ends_as_python_does(start, more):
    forked, new = ended(start(more)), ended(start(more, python=sys.executable))
    assert forked[:3] == new[:3]
    assert forked[3].splitlines()[0] == "to errors"
    assert forked[3].splitlines()[-1] == new[3].splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_signal_that_ends_it_is_reported(start, number):
    process = start(
        f"signal = __import__('signal'); signal.signal({number}, signal.SIG_DFL) if {number} != 9 else 0\n"
        f"os.kill(os.getpid(), {number})"
    )
    assert ended(process)[0] == -number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_client_ends_what_it_has_started(start, number):
    process = start("time.sleep(60)")
    process.stdin.close()
    *_, pid = json.loads(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(timeout=10) == -number
    deadline = time.monotonic() + 10
    while pathlib.Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the fork outlives its client"
        time.sleep(0.01)


def test_other_settings_and_other_command_lines_run_in_a_new_interpreter(start):
    process = start("print(os.path.exists('/proc'), file=sys.stderr)", JAX_ENABLE_X64="1")
    output, _ = process.communicate("typed", timeout=60)
    assert json.loads(output)[-1] == process.pid
    output, _ = start("", "-c", "import os; print(os.getpid())").communicate(timeout=60)
    assert int(output) > 0


def test_libraries_are_imported_and_the_package_is_not(start):
    more = "print([name in sys.modules for name in ('jax', 'orbax.checkpoint', 'clip_jax')], file=sys.stderr)"
    assert ended(start(more))[3].endswith("[True, True, False]\n")
