"""One training at a time writes to a folder; the lock of one that is gone is taken over."""

import json
import os
import subprocess
import sys
import time

import pytest

from clip_jax.training import folder_lock
from clip_jax.training.folder_lock import claimed

ELSEWHERE = {"host": "elsewhere", "boot": "another", "process": 12, "started": "2026-01-01 10:00:00", "token": "t"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(folder_lock, "PAUSE", 0.1)
    monkeypatch.setattr(folder_lock, "SILENCE", 2)


@pytest.fixture
def end(monkeypatch) -> list[str]:
    """The line with which the process would end."""
    lines = []
    monkeypatch.setattr(folder_lock._Lock, "_end", lambda lock, line: (lines.append(line), lock._released.set()))
    return lines


def wait_for(lines: list[str]) -> str:
    deadline = time.monotonic() + 10
    while not lines and time.monotonic() < deadline:
        time.sleep(0.05)
    return lines[0]


def test_the_lock_is_there_until_the_end(tmp_path):
    with claimed(tmp_path / "run"):
        found = json.loads((tmp_path / "run/lock.json").read_text())
        assert found["process"] == os.getpid()
        time.sleep(0.5)
        assert json.loads((tmp_path / "run/lock.json").read_text())["beat"] > found["beat"]
    assert not list((tmp_path / "run").iterdir())


def test_a_second_training_is_refused_in_one_line(tmp_path):
    with claimed(tmp_path):
        expected = rf"is in use by another training \(process {os.getpid()} on "
        with pytest.raises(ValueError, match=expected) as refused, claimed(tmp_path):
            pass
        assert "\n" not in str(refused.value)
        assert (tmp_path / "lock.json").exists()


def test_the_lock_of_a_killed_process_of_this_machine_is_taken_over_at_once(tmp_path):
    program = (
        "import os, sys\nfrom clip_jax.training.folder_lock import claimed\nwith claimed(sys.argv[1]):\n    os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=False)
    assert (tmp_path / "lock.json").exists()
    started = time.monotonic()
    with claimed(tmp_path):
        assert time.monotonic() - started < 1
    assert not (tmp_path / "lock.json").exists()


def test_the_lock_of_another_machine_is_taken_over_after_a_silence(tmp_path):
    (tmp_path / "lock.json").write_text(json.dumps(ELSEWHERE))
    started = time.monotonic()
    with claimed(tmp_path):
        assert time.monotonic() - started >= 2
        assert json.loads((tmp_path / "lock.json").read_text())["process"] == os.getpid()


def test_the_lock_of_another_machine_that_shows_life_is_respected(tmp_path, monkeypatch):
    path, beats = tmp_path / "lock.json", iter(range(100))
    path.write_text(json.dumps(ELSEWHERE))
    read = folder_lock._read
    monkeypatch.setattr(folder_lock, "_read", lambda path: read(path) and read(path) | {"beat": next(beats)})
    with pytest.raises(ValueError, match="process 12 on elsewhere, started 2026-01-01 10:00:00"), claimed(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_damaged_lock_is_taken_over(tmp_path, content):
    (tmp_path / "lock.json").write_text(content)
    with claimed(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["process"] == os.getpid()


def test_a_deleted_folder_ends_the_training(tmp_path, end):
    with claimed(tmp_path / "run"):
        (tmp_path / "run/lock.json").unlink()
        (tmp_path / "run").rmdir()
        assert wait_for(end) == f"the folder {tmp_path}/run has been deleted while the training was writing to it"


def test_a_lock_that_another_training_has_taken_over_ends_this_one(tmp_path, end):
    with claimed(tmp_path):
        (tmp_path / "lock.json").unlink()
        (tmp_path / "lock.json").write_text(json.dumps(ELSEWHERE))
        assert "another training's" in wait_for(end)
    assert json.loads((tmp_path / "lock.json").read_text()) == ELSEWHERE


def test_what_killed_trainings_have_left_is_removed(tmp_path):
    (tmp_path / "eval").mkdir()
    for name in (".unfinished-1-config.json", "eval/.unfinished-2-10.json", "eval/10.json"):
        (tmp_path / name).write_text("{}")
    with claimed(tmp_path):
        pass
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")] == ["eval/10.json"]


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Not a directory"), claimed(tmp_path / "file" / "run"):
        pass
