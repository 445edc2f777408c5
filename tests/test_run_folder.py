"""Which of a run's checkpoints its parameters are read from."""

import numpy as np
import orbax.checkpoint as ocp
import pytest

from clip_jax.run_folder import CheckpointError, restore_variables


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of the steps 2, 9 and 10, whose only parameter is the step."""
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        for step in (2, 9, 10):
            state = {"params": {"step": np.float32([step])}}
            manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
    return tmp_path


def damage(run, step):
    for file in (run / f"checkpoints/{step}/state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def test_parameters_are_those_of_the_newest_checkpoint_that_can_be_read(run):
    assert restore_variables(run)["params"]["step"] == [10]
    damage(run, 10)
    assert restore_variables(run)["params"]["step"] == [9]


def test_a_run_without_a_readable_checkpoint_is_an_error(run):
    for step in (2, 9, 10):
        damage(run, step)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .*\[10, 9, 2\]"):
        restore_variables(run)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        restore_variables(run / "other")
