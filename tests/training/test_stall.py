"""A training without progress ends, with what it waits for in one line."""

import subprocess
import sys
import time

import pytest

from clip_jax.training.stall import StallWatch


def ended(program: str) -> tuple[int, list[str]]:
    lines = (
        "import logging, time\nfrom clip_jax.command_line import set_up_logging\n"
        "from clip_jax.training.stall import StallWatch\nset_up_logging()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", lines + program], stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    return result.returncode, result.stderr.splitlines()


def test_a_main_thread_that_waits_too_long_ends_the_process():
    code, [warning, line] = ended(
        "watch = StallWatch(2 / 60, lambda: False, '/run/checkpoints')\n"
        "watch.waits_for('the data of step 7')\ntime.sleep(30)"
    )
    assert code == 1
    assert warning.startswith("no progress for 1 s while the training waits for the data of step 7; it ends after")
    assert line.startswith("failed: no progress for 0.0333333 minutes while the training waits for the data of step 7;")


def test_a_save_in_the_background_that_does_not_end_ends_the_process():
    code, lines = ended(
        "watch = StallWatch(2 / 60, lambda: True, '/run/checkpoints')\n"
        "while True: watch.waits_for('the data'); time.sleep(0.1)"
    )
    assert code == 1
    assert "waits for the end of a save to /run/checkpoints; the same command" in lines[-1]


@pytest.mark.parametrize("minutes", [3 / 60, 0])
def test_progress_and_no_limit_end_nothing(minutes, monkeypatch):
    ends = []
    monkeypatch.setattr(StallWatch, "_end", lambda watch, what: ends.append(what))
    saves = iter([True, False] * 10)
    watch = StallWatch(minutes, lambda: next(saves), "folder")
    for _ in range(8):
        watch.waits_for("something")
        time.sleep(0.5)
    watch.close()
    assert not ends
