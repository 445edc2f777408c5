"""The training that the tests of killed, lost and several processes compare theirs with."""

import pathlib

import pytest
from trial import SMALL, run

STEPS = "--config.steps=40"
OFTEN = "--config.checkpoint_every=10"


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> pathlib.Path:
    """The folder of a run of 40 steps on one device, with a checkpoint every 10."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(*SMALL, STEPS, OFTEN, f"--workdir={workdir}")
    return workdir
