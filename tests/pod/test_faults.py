"""Ends trainings at random moments, by SIGKILL, SIGTERM and SIGINT, until a run has finished: it must not show.

The short form is part of every test run. The long form, 300 kills and 100 signals with new interpreters, is nightly:

    pytest tests/pod/test_faults.py
"""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from trial import SMALL, finish, kill, losses, start

from clip_jax.run_folder import restore_variables

ARGUMENTS = [
    *SMALL,
    "--config.steps=30",
    "--config.checkpoint_every=7",
    "--config.eval_every=10",
    "--config.evaluation.tasks=emoji_unseen_both",
]


@pytest.fixture(scope="module")
def never_disturbed(tmp_path_factory) -> tuple[pathlib.Path, float]:
    """The folder of a run that nothing has disturbed, and the seconds that such a run takes."""
    workdir = tmp_path_factory.mktemp("never_disturbed")
    assert life(workdir / "compiled_before", workers=0, moment=None, python=sys.executable)[0] == 0
    started = time.monotonic()
    assert life(workdir / "run", workers=0, moment=None, python=sys.executable)[0] == 0
    return workdir / "run", time.monotonic() - started


def life(
    workdir: pathlib.Path, workers: int, moment, number: int = signal.SIGKILL, python: str = ""
) -> tuple[int, str]:
    """Starts the training and ends it after ``moment`` seconds, if it runs so long. Returns exit code and output.

    A signal that arrives before Python has started the program is sent again.
    """
    process = start(*ARGUMENTS, f"--config.data.num_workers={workers}", f"--workdir={workdir}", python=python)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment if moment is not None else 300)
    if process.poll() is None:
        if number == signal.SIGKILL:
            kill(process)
        else:
            wait_until_caught(process, number)
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, number)  # as a terminal does: to the workers as well
    output = finish(process)
    return process.returncode, output


def wait_until_caught(process: subprocess.Popen, number: int) -> None:
    """Waits until the process has a handler for the signal. Python itself takes 30 ms to start."""
    status = pathlib.Path(f"/proc/{process.pid}/status")
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) >> (number - 1) & 1:
            return
        time.sleep(0.001)


def assert_undisturbed(workdir: pathlib.Path, reference: pathlib.Path) -> None:
    assert losses(workdir) == losses(reference)
    for evaluated in (reference / "eval").iterdir():
        found = json.loads((workdir / "eval" / evaluated.name).read_text())
        assert found["tasks"] == json.loads(evaluated.read_text())["tasks"]
    parameters, expected = restore_variables(workdir), restore_variables(reference)
    for (name, array), (_, other) in zip(*(sorted(flat(tree)) for tree in (parameters, expected)), strict=True):
        np.testing.assert_array_equal(array, other, err_msg=name)
    left = [path.name for path in workdir.rglob("*") if "tmp" in path.name or path.name.startswith(".unfinished")]
    assert not left and not (workdir / "lock.json").exists()


def flat(tree: dict, prefix: str = "") -> list[tuple[str, np.ndarray]]:
    found = []
    for name, value in tree.items():
        found += flat(value, f"{prefix}{name}/") if isinstance(value, dict) else [(prefix + name, value)]
    return found


def disturb(seed: int, kills: int, signals: int, undisturbed, folder: pathlib.Path, python: str) -> None:
    reference, seconds = undisturbed
    draw = random.Random(seed)
    endings = [signal.SIGKILL] * kills + [draw.choice([signal.SIGTERM, signal.SIGINT]) for _ in range(signals)]
    draw.shuffle(endings)
    run = 0
    for number in [*endings, None]:
        moment = draw.uniform(0, seconds) if number else None
        workers = draw.choice([0, 1, 2])
        code, output = life(folder / f"{run}", workers, moment, number or signal.SIGKILL, python)
        what = f"seed {seed}, run {run}, {number!r} after {moment} s with {workers} workers ended with {code}: {output}"
        assert "Traceback" not in output, what
        if code == 0:
            assert_undisturbed(folder / f"{run}", reference)
            run += 1
        elif number == signal.SIGKILL:
            assert code == -signal.SIGKILL, what
        else:
            assert code == 3, what
            assert "stopped at step" in output or "interrupted" in output, what


def processes_that_name(folder: pathlib.Path) -> list[str]:
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in process.read_bytes():
                found.append(process.parent.name)
    return found


@pytest.mark.parametrize(
    ("seed", "kills", "signals", "python"),
    [(0, 3, 3, ""), *(pytest.param(seed, 15, 5, sys.executable, marks=pytest.mark.slow) for seed in range(1, 21))],
)
def test_a_run_ended_at_random_moments_has_the_losses_and_parameters_of_one_that_was_not(
    never_disturbed, tmp_path, monkeypatch, seed, kills, signals, python
):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    disturb(seed, kills, signals, never_disturbed, tmp_path, python)
    assert not list(temporary.iterdir())
    assert not processes_that_name(tmp_path)
