"""Training goes on past single bad samples, and stops with a line and a checkpoint where that would be wrong."""

import json
import os
import pathlib
import re
import signal
import sys

import numpy as np
import pytest
from PIL import Image
from shards import image_bytes, pair_members, write_shards, write_tar
from trial import SMALL, finish, kill, start, wait_for_step

from clip_jax.data import bad_samples
from clip_jax.data.bad_samples import REASONS, BadSample, BadSamples, TooManyBadSamplesError
from clip_jax.main import main

pytestmark = pytest.mark.usefixtures("one_device")

STEPS = "--config.steps=8"  # in all that end early, too: the schedule, and so the program, depends on their number


def arguments(source: str, workdir, *more: str) -> list[str]:
    return [*SMALL, f"--config.data.source={source}", f"--workdir={workdir}", *more]


def records(workdir) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def write_worse_shard(folder, every: int) -> str:
    """Sixty pairs. One image in ``every`` is not a valid image."""
    members = pair_members(range(60))
    members = [
        (name, b"nothing") if name.endswith(".png") and int(name[:6]) % every == every - 1 else (name, content)
        for name, content in members
    ]
    write_tar(folder / "a.tar", members)
    return f"wds:{folder}/a.tar"


def test_each_kind_of_bad_sample_is_counted_and_listed_by_name(capsys, tmp_path):
    small = image_bytes(2, size=1)
    Image.new("RGB", (64, 4)).save(tmp_path / "thin.png")
    thin = (tmp_path / "thin.png").read_bytes()
    members = [
        *pair_members(range(51)),
        *[("a.png", b"nothing"), ("a.txt", b"x"), ("b.png", image_bytes(1)), ("b.txt", b" "), ("c.txt", b"x")],
        *[("d.png", thin), ("d.txt", b"x"), ("e.png", small), ("e.txt", b"x"), ("../f.png", image_bytes(1))],
        *[("000001.png", image_bytes(1)), ("000001.txt", b"again")],
    ]
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", pair_members(range(100, 106)))
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: whole.index(b"told 105")])
    limits = ["--config.data.min_image_side=4", "--config.data.max_aspect_ratio=8", "--config.data.max_bad_share=1"]
    workdir = tmp_path / "run"
    # 51 + 7 + 6 records: an epoch is four batches of 16.
    assert main(arguments(f"wds:{tmp_path}/{{a,b}}.tar", workdir, *limits, STEPS)) == 0
    expected = {
        "undecodable": "a",
        "empty_caption": "b",
        "no_image": "c",
        "extreme_aspect_ratio": "d",
        "too_small": "e",
        "unsafe_name": "record 56",
        "duplicate_key": "record 57",
        "truncated_file": "record 5 ",
    }
    last = records(workdir)[-1]
    counted = {name.partition("/")[2]: last[name] for name in last if name.startswith("bad_samples/")}
    assert counted == dict.fromkeys(expected, 2)
    assert last["bad_samples"] == 2 * 8
    assert last["epochs"] == 2
    listed = [json.loads(line) for line in (workdir / "bad_samples.jsonl").read_text().splitlines()]
    assert {sample["reason"] for sample in listed} == set(expected)
    for sample in listed:
        assert expected[sample["reason"]] in f"{sample['name']} {sample['message']}"
    assert "../" not in {path.name for path in tmp_path.iterdir()}


def test_too_many_bad_samples_end_the_run_with_a_line_and_a_checkpoint_that_goes_on(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bad_samples, "MIN_SAMPLES", 100)
    source = write_worse_shard(tmp_path, every=5)
    flags = arguments(source, tmp_path / "run", STEPS)
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert "samples are bad, more than config.data.max_bad_share=0.1 allows (undecodable" in error
    assert "a.tar: 0000" in error and "bad_samples.jsonl lists them" in error
    assert len(error.splitlines()) == 1
    [saved] = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(saved.name) == 7  # of 16 samples each: the first with a hundred to judge by
    assert main([*flags, "--config.data.max_bad_share=0.3"]) == 0
    assert records(tmp_path / "run")[-1]["step"] == 8


def test_a_shard_deleted_during_the_run_ends_it_with_its_name_and_a_checkpoint(capsys, tmp_path, monkeypatch):
    source = write_shards(tmp_path, shards=20, pairs=30)  # a twentieth of the data, so no matter of shares
    count = BadSamples.count

    def count_and_delete(self, reasons):
        count(self, reasons)
        if self.seen == 10 * 16:
            (tmp_path / "00007.tar").unlink()

    monkeypatch.setattr(BadSamples, "count", count_and_delete)
    assert main(arguments(source, tmp_path / "run", "--config.steps=200")) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"failed: \S+/00007\.tar: No such file or directory\n", error)
    [saved] = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(saved.name) >= 10


def test_a_worker_that_is_killed_ends_the_run_with_a_line_and_a_checkpoint(tmp_path):
    source = write_shards(tmp_path, shards=2, pairs=30)
    flags = arguments(source, tmp_path / "run", "--config.steps=100000")
    flags = [*(flag for flag in flags if "num_workers" not in flag), "--config.data.num_workers=2"]
    process = start(*flags, python=sys.executable)
    try:
        wait_for_step(process, 5)
        threads = pathlib.Path(f"/proc/{process.pid}/task").iterdir()
        children = [pid for thread in threads for pid in (thread / "children").read_text().split()]
        workers = [pid for pid in children if b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(int(workers[0]), signal.SIGKILL)
        output = finish(process)
    finally:
        kill(process)
    assert process.returncode == 1
    assert "failed: " in output and "Traceback" not in output, output
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_full_disk_is_a_line_and_the_state_is_saved_where_there_is_room(capsys, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "metrics.jsonl").symlink_to("/dev/full")
    assert main(arguments(write_shards(tmp_path, 1, 30), workdir, STEPS)) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]  # step 1 is logged when 2 has started
    (workdir / "metrics.jsonl").unlink()
    assert main(arguments(write_shards(tmp_path, 1, 30), workdir, STEPS)) == 0


def test_a_checkpoint_that_cannot_be_written_is_a_line(capsys, tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    assert main(arguments(write_shards(tmp_path, 1, 30), tmp_path / "run", STEPS)) == 1
    error = capsys.readouterr().err
    assert "a checkpoint cannot be written to" in error and "No space left on device" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_two_sources_report_epochs_and_losses_of_their_own(tmp_path, steps):
    source = write_shards(tmp_path, shards=1, pairs=24)
    flags = arguments(f"{source} + emoji:noto/held_out", tmp_path / "run", "--config.steps=6")
    flags.append(f"--config.accumulation_steps={steps}")
    assert main([*flags, "--config.data.weights=3:1"]) == 0
    last = records(tmp_path / "run")[-1]
    assert last[f"epochs/{source}"] == 6 * 16 * 3 / 4 / 24
    assert 0 < last["epochs/emoji:noto/held_out"] < 1
    # A batch of 16 has exactly twelve of the one and four of the other.
    mean = (3 * last[f"loss/{source}"] + last["loss/emoji:noto/held_out"]) / 4
    assert mean == pytest.approx(last["loss"], rel=1e-5)
    assert abs(last[f"loss/{source}"] - last["loss"]) > 1e-4


def test_a_source_of_which_a_batch_has_no_pair_reports_no_loss(tmp_path):
    source = write_shards(tmp_path, shards=1, pairs=24)
    flags = arguments(f"{source} + emoji:noto/held_out", tmp_path / "run", "--config.steps=6")
    assert main([*flags, "--config.data.weights=1000:1"]) == 0
    last = records(tmp_path / "run")[-1]
    assert f"loss/{source}" in last and "loss/emoji:noto/held_out" not in last


def test_the_list_of_bad_samples_names_each_once_also_after_a_kill(tmp_path):
    file = tmp_path / "run" / "bad_samples.jsonl"
    first = BadSamples(file)
    first.add_to_list([BadSample(3, "undecodable", "a", "x"), BadSample(4, "too_small", "b", "y")])
    with file.open("ab") as lines:
        lines.write(b'{"index": 5, "rea\xff')
    second = BadSamples(file)
    assert [second.is_new(index) for index in (3, 4, 5)] == [False, False, True]
    second.add_to_list([BadSample(5, "too_large", "c", "z")])
    lines = file.read_bytes().splitlines()
    assert [json.loads(line)["index"] for line in (lines[0], lines[1], lines[3])] == [3, 4, 5]


def test_a_share_is_judged_only_by_enough_samples(tmp_path):
    found = BadSamples(tmp_path / "bad_samples.jsonl")
    counts = [0] * len(REASONS)
    counts[0] = 999
    found.check(counts, 999, 0.1)
    with pytest.raises(TooManyBadSamplesError, match=r"999 of 1,000 samples are bad.*\(undecodable 999\)"):
        found.check(counts, 1_000, 0.1)
    found.count(np.array([-1, 0, 0, 3], np.int8))
    assert found.seen == 4
    assert found.counts[:4].tolist() == [2, 0, 0, 1]
