"""A training may be killed at any moment, and goes on as if nothing had happened."""

import os
import signal

import pytest
from trial import SMALL, finish, kill, losses, run, start, wait_for_step

STEPS = "--config.steps=80"
OFTEN = "--config.checkpoint_every=10"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, float]:
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(*SMALL, STEPS, OFTEN, f"--workdir={workdir}")
    return losses(workdir)


def test_a_training_killed_in_the_middle_of_step_37_continues_bit_for_bit(undisturbed, tmp_path):
    process = start(*SMALL, STEPS, OFTEN, f"--workdir={tmp_path}")
    wait_for_step(process, 36)
    kill(process)
    assert max(losses(tmp_path)) < 80
    output = run(*SMALL, STEPS, OFTEN, f"--workdir={tmp_path}")
    assert "resumed at step 30 of 80" in output or "resumed at step 20 of 80" in output
    assert losses(tmp_path) == undisturbed


def test_resuming_with_other_workers_continues_bit_for_bit(undisturbed, tmp_path):
    process = start(*SMALL, STEPS, OFTEN, f"--workdir={tmp_path}")
    wait_for_step(process, 25)
    kill(process)
    run(*SMALL, STEPS, OFTEN, f"--workdir={tmp_path}", "--config.data.num_workers=2", "--config.data.num_threads=1")
    assert losses(tmp_path) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_leaves_with_the_step_printed(undisturbed, tmp_path, number):
    workers = "--config.data.num_workers=1"
    process = start(*SMALL, STEPS, "--config.checkpoint_every=1000", workers, f"--workdir={tmp_path}")
    wait_for_step(process, 12)
    os.killpg(process.pid, number)  # as a terminal does: to the workers as well
    output = finish(process)
    assert process.returncode == 3, output
    [stopped] = [line for line in output.splitlines() if line.startswith("stopped at step")]
    step = int(stopped.split()[3])
    assert f"resumed at step {step} of 80" in run(*SMALL, STEPS, OFTEN, f"--workdir={tmp_path}")
    assert losses(tmp_path) == undisturbed


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(undisturbed, tmp_path):
    process = start(*SMALL, STEPS, OFTEN, f"--workdir={tmp_path}")
    wait_for_step(process, 33)
    kill(process)
    # Not what the kill left half-written, which has another name.
    whole = [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    newest = max(whole, key=lambda path: int(path.name))
    for file in (newest / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    output = run(*SMALL, STEPS, OFTEN, f"--workdir={tmp_path}")
    assert f"checkpoint {newest.name} cannot be read and is skipped" in output
    assert (tmp_path / f"damaged_checkpoint_{newest.name}" / "state").is_dir()
    assert losses(tmp_path) == undisturbed


def test_a_run_whose_only_checkpoint_is_damaged_stops_with_one_line(tmp_path):
    run(*SMALL, "--config.steps=2", f"--workdir={tmp_path}")
    for file in (tmp_path / "checkpoints/2/state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    for _ in range(2):  # the second time as well: nothing was touched that would make it start anew
        process = start(*SMALL, "--config.steps=2", f"--workdir={tmp_path}")
        output = finish(process)
        assert process.returncode == 1
        assert "failed: none of the checkpoints" in output
        assert "Traceback" not in output


def test_a_finished_run_started_again_trains_no_further(undisturbed, tmp_path):
    few = "--config.steps=3"
    run(*SMALL, few, f"--workdir={tmp_path}")
    before = (tmp_path / "metrics.jsonl").read_text()
    assert "finished 3 steps" in run(*SMALL, few, f"--workdir={tmp_path}")
    assert (tmp_path / "metrics.jsonl").read_text() == before
