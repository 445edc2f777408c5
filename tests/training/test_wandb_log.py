"""Weights & Biases gets the metrics of all processes of a run as one run, and cannot end a training."""

import importlib.util
import types

import numpy as np
import pytest
from etils import epath
from trial import SMALL

from clip_jax.main import main
from clip_jax.training import wandb_log
from clip_jax.training.wandb_log import LoggingSettings, WandbLog

PROJECT = LoggingSettings(wandb_project="clip")


class Service:
    """Stands in for the package: records what it gets, and raises ``error`` in ``failing``."""

    def __init__(self, failing: str = "", error: Exception = OSError("no network")):  # noqa: B008
        self.calls, self.url = [], "https://host/run"
        self._failing, self._error = failing, error
        self.errors = types.SimpleNamespace(UsageError=KeyError)
        self.Settings = dict

    def init(self, **arguments):
        self._record("init", arguments)
        return self

    def define_metric(self, name, step_metric):
        self._record("define_metric", (name, step_metric))

    def log(self, values):
        self._record("log", values)

    def finish(self):
        self._record("finish", None)

    def _record(self, name, value):
        if name == self._failing:
            raise self._error
        self.calls.append((name, value))


@pytest.fixture
def use(monkeypatch):
    def replace(service: Service) -> Service:
        monkeypatch.setitem(__import__("sys").modules, "wandb", service)
        return service

    return replace


def test_all_processes_of_a_run_have_one_id_and_metrics_have_their_own_step(tmp_path, use):
    service, ids = use(Service()), []
    for _ in range(2):
        log = WandbLog(PROJECT, epath.Path(tmp_path), {"seed": 0})
        log.write(7, {"loss": 1.5})
        log.close()
        ids.append(service.calls[0][1]["id"])
        assert (
            service.calls[0][1] | {"project": "clip", "resume": "allow", "config": {"seed": 0}} == service.calls[0][1]
        )
        assert service.calls[1:] == [
            ("define_metric", ("*", "step")),
            ("log", {"step": 7, "loss": 1.5}),
            ("finish", None),
        ]
        service.calls.clear()
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text()


@pytest.mark.parametrize("failing", ["init", "define_metric", "log", "finish"])
def test_an_error_of_the_service_is_logged_once(tmp_path, use, failing, monkeypatch):
    use(Service(failing))
    warnings = []
    monkeypatch.setattr(wandb_log.logger, "warning", lambda text, *values: warnings.append(text % values))
    log = WandbLog(PROJECT, epath.Path(tmp_path), {})
    for step in range(3):
        log.write(step, {"loss": 1.0})
    log.close()
    assert warnings == ["Weights & Biases gets nothing more until the next start: no network"]


def test_an_image_that_cannot_be_stored_does_not_end_the_training(tmp_path, use, monkeypatch):
    service, warnings = use(Service()), []

    def full_disk(image):
        raise OSError("No space left on device")

    service.Image = full_disk
    monkeypatch.setattr(wandb_log.logger, "warning", lambda text, *values: warnings.append(text % values))
    log = WandbLog(PROJECT, epath.Path(tmp_path), {})
    log.write_image(1, "task/samples", np.zeros((8, 8, 3), np.uint8))
    assert warnings == ["Weights & Biases gets nothing more until the next start: No space left on device"]


def test_a_missing_login_names_the_way_out(tmp_path, use):
    use(Service("init", KeyError("api_key not configured")))
    with pytest.raises(Exception, match="run wandb login, or set WANDB_MODE=offline"):
        WandbLog(PROJECT, epath.Path(tmp_path), {})


def test_a_missing_package_is_a_problem_of_the_config(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert PROJECT.problems() == [
        "config.logging.wandb_project=clip needs a package: pip install 'clip-jax-tpu[wandb]'"
    ]
    assert LoggingSettings().problems() == []


def test_an_entity_without_a_project_is_a_problem():
    assert "needs config.logging.wandb_project" in LoggingSettings(wandb_entity="me").problems()[0]


@pytest.mark.usefixtures("one_device")
def test_offline_mode_writes_into_the_folder_of_the_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    arguments = [*SMALL, f"--workdir={tmp_path}/run", "--config.steps=2", "--config.logging.wandb_project=clip"]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert f"Weights & Biases: offline, in {tmp_path}/run/wandb" in output.out
    [file] = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    name = (tmp_path / "run/wandb_id").read_text()
    assert name in file.name and b"images_per_second" in file.read_bytes() and b"learning_rate" in file.read_bytes()
