"""What a run's metrics record: its training time over all processes, each step once, and only finite losses."""

import contextlib
import errno
import json
import math
import os
import re
import struct
import types

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog

from clip_jax.training.metrics import MetricWriter, StepLog, read_metrics, training_seconds


class Writer:
    def __init__(self):
        self.records = []

    def write(self, step, scalars):
        self.records.append({"step": step, **scalars})


def test_the_training_time_goes_on_from_the_processes_before(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("clip_jax.training.metrics.time.perf_counter", lambda: now[0])
    writer = Writer()
    log = StepLog(every=2, images_per_step=8, last_step=6, writer=writer, seconds_before=50.0)
    metrics = {"loss": 1.0, "gradient_norm": 1.0, "image_to_text_accuracy": 0.5, "text_to_image_accuracy": 0.5}
    for step in (4, 5, 6):
        now[0] += 10
        log.add(step, metrics, {})
    log.flush()
    assert [(record["step"], record["seconds"]) for record in writer.records] == [(4, 70.0), (6, 80.0)]
    history = [{"step": 2, "seconds": 50.0}, *writer.records, {"step": 6, "odd/top_1": 0.5}]
    assert [training_seconds(history, step) for step in (1, 2, 3, 4, 6)] == [0, 50.0, 50.0, 70.0, 80.0]
    assert training_seconds([{"step": 1, "loss": 1.0}], 1) == 0  # a run from before the times were kept


def test_rate_share_of_waiting_and_time_left_are_those_since_the_last_record(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("clip_jax.training.metrics.time.perf_counter", lambda: now[0])
    writer = Writer()
    log = StepLog(every=2, images_per_step=8, last_step=6, writer=writer)
    metrics = {"loss": 1.0, "gradient_norm": 1.0, "image_to_text_accuracy": 0.5, "text_to_image_accuracy": 0.5}
    for step, (wait, work) in enumerate([(9, 90), (1, 4), (1, 4), (3, 1), (3, 1)], start=1):
        with log.during("input"):
            now[0] += wait
        now[0] += work
        log.add(step, metrics, {})
    names = ("step", "images_per_second", "data_wait_share", "seconds_left")
    # A step is logged when the next has started; the first, with its compilation, counts for nothing.
    assert [tuple(record[name] for name in names) for record in writer.records] == [
        (2, 8 / 5, 1 / 5, 4 * 5),
        (4, 16 / 8, 6 / 8, 2 * 4),
    ]


def test_the_seconds_by_part_add_up_to_the_time_between_records(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("clip_jax.training.metrics.time.perf_counter", lambda: now[0])
    writer = Writer()
    log = StepLog(every=2, images_per_step=8, last_step=6, writer=writer)
    metrics = {"loss": 1.0, "gradient_norm": 1.0, "image_to_text_accuracy": 0.5, "text_to_image_accuracy": 0.5}
    for step in range(1, 7):
        for part, seconds in (("input", 1), ("save", 2 if step == 3 else 0)):
            with log.during(part):
                now[0] += seconds
        now[0] += 4
        log.add(step, metrics, {})
        if step == 4:
            log.flush()
            with log.during("evaluation"):
                now[0] += 100
    now[0] += 1
    log.flush()
    parts = ("input", "step", "save", "evaluation")
    assert [tuple(record[f"seconds/{part}"] for part in parts) for record in writer.records] == [
        (3, 12, 2, 0),  # a step is logged when the next one has started
        (1, 4, 0, 0),
        (2, 9, 0, 100),
    ]


def test_a_step_that_was_run_twice_has_its_later_record(tmp_path):
    records = [
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": 3.0},
        {"step": 2, "odd/top_1": 0.5},
        {"step": 2, "loss": 2.5},
    ]
    lines = [json.dumps(record) for record in records]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read_metrics(tmp_path) == [records[0], records[3], records[2]]


DAMAGED = (b"null", b"[]", b"{}", b'{"step": null}', b'{"step": 3, "lo', b'{"step": 3, "loss": "x"}', b"\xff", b"\0")


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_left_out_and_counted(tmp_path, caplog, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 4.0}\n' + line + b'\n{"step": 2, "loss": NaN}\n')
    assert [record["step"] for record in read_metrics(epath.Path(tmp_path))] == [1, 2]
    assert caplog.messages == ["metrics.jsonl: 1 of 3 lines are damaged and left out"]


def events(file) -> list[Event]:
    """The events of a file of TensorBoard: TFRecords, whose checksums are passed over."""
    content, found = file.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    return found


@pytest.mark.parametrize("step", [0, 3])
def test_tensorboard_is_told_which_steps_are_run_again(tmp_path, step):
    with contextlib.closing(MetricWriter(epath.Path(tmp_path), step)) as writer:
        writer.write(step + 1, {"loss": 4.0})
    [file] = (tmp_path / "tensorboard").iterdir()
    assert [event.step for event in events(file) if event.session_log.status == SessionLog.START] == [step + 1]


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_an_error(name, value):
    with pytest.raises(FloatingPointError, match=rf"{name} is {value} at step 7"):
        StepLog.check_finite(7, {"loss": 1.0, "gradient_norm": 1.0, name: value})


def test_images_are_written_to_tensorboard_and_wandb(tmp_path):
    sent = []
    wandb = types.SimpleNamespace(write_image=lambda *values: sent.append(values), close=lambda: None)
    image = np.zeros((4, 6, 3), np.uint8)
    with contextlib.closing(MetricWriter(epath.Path(tmp_path), 0, wandb)) as writer:
        writer.write_image(5, "task/samples", image)
    [(step, name, array)] = sent
    assert (step, name) == (5, "task/samples") and array is image
    [file] = (tmp_path / "tensorboard").iterdir()
    assert b"task/samples" in file.read_bytes() and b"PNG" in file.read_bytes()


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    writer = MetricWriter(epath.Path(tmp_path), 0)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer._tensorboard._events, "write_event", full)
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{tmp_path}/metrics.jsonl'")):
        writer.write(1, {"loss": 1.0})
    monkeypatch.setattr(writer._tensorboard._events, "close", full)
    writer.close()
