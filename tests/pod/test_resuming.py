"""A training may be killed at any moment, and goes on as if nothing had happened."""

import os
import pathlib
import shutil
import signal

import pytest
from trial import SMALL, finish, kill, losses, run, start, wait_for_step

STEPS = "--config.steps=40"
OFTEN = "--config.checkpoint_every=10"


def copy_of(run_folder: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(run_folder, to / "run")


def damage(checkpoint: pathlib.Path, kept_bytes: int) -> None:
    for file in (checkpoint / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:kept_bytes])


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_training_killed_in_the_middle_of_a_step_continues_bit_for_bit(undisturbed, tmp_path, workers):
    """With two workers, other processes than before the kill read the data."""
    process = start(*SMALL, STEPS, OFTEN, f"--workdir={tmp_path}")
    wait_for_step(process, 26)
    kill(process)
    assert max(losses(tmp_path)) < 40
    output = run(*SMALL, STEPS, OFTEN, f"--workdir={tmp_path}", f"--config.data.num_workers={workers}")
    assert "resumed at step 20 of 40" in output or "resumed at step 10 of 40" in output
    assert losses(tmp_path) == losses(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_leaves_with_the_step_printed(undisturbed, tmp_path, number):
    workers = "--config.data.num_workers=1"
    process = start(*SMALL, STEPS, "--config.checkpoint_every=1000", workers, f"--workdir={tmp_path}")
    wait_for_step(process, 5)
    os.killpg(process.pid, number)  # as a terminal does: to the workers as well
    output = finish(process)
    assert process.returncode == 3, output
    [stopped] = [line for line in output.splitlines() if line.startswith("stopped at step")]
    step = int(stopped.split()[3])
    assert f"resumed at step {step} of 40" in run(*SMALL, STEPS, OFTEN, f"--workdir={tmp_path}")
    assert losses(tmp_path) == losses(undisturbed)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(undisturbed, tmp_path):
    workdir = copy_of(undisturbed, tmp_path)
    damage(workdir / "checkpoints/40", kept_bytes=10)
    output = run(*SMALL, STEPS, OFTEN, f"--workdir={workdir}")
    assert "checkpoint 40 is damaged and is skipped: state/_METADATA is not JSON" in output
    assert "resumed at step 30 of 40" in output
    assert (workdir / "damaged_checkpoint_40" / "state").is_dir()
    assert losses(workdir) == losses(undisturbed)


def test_a_run_whose_only_checkpoint_is_damaged_stops_with_one_line(undisturbed, tmp_path):
    workdir = copy_of(undisturbed, tmp_path)
    for checkpoint in (workdir / "checkpoints").iterdir():
        if checkpoint.name != "40":
            shutil.rmtree(checkpoint)
    damage(workdir / "checkpoints/40", kept_bytes=0)
    before = sorted(workdir.rglob("*"))
    process = start(*SMALL, STEPS, OFTEN, f"--workdir={workdir}")
    output = finish(process)
    assert process.returncode == 1
    assert "failed: none of the checkpoints" in output
    assert "Traceback" not in output
    # Nothing was moved or removed, which would make it start anew the next time.
    assert set(before) <= set(workdir.rglob("*"))


def test_a_finished_run_started_again_trains_no_further(undisturbed, tmp_path):
    workdir = copy_of(undisturbed, tmp_path)
    before = (workdir / "metrics.jsonl").read_text()
    assert "finished 40 steps" in run(*SMALL, STEPS, OFTEN, f"--workdir={workdir}")
    assert (workdir / "metrics.jsonl").read_text() == before
