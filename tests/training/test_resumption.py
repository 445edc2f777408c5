"""A run goes on with other settings or data, from its newest or an older checkpoint, and skips batches."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from trial import SMALL, losses

from clip_jax.config import check_allowed, flatten, validate
from clip_jax.history import Segment
from clip_jax.main import main, parse_arguments
from clip_jax.training.feed import Feed, order_seed
from clip_jax.training.preparation import prepare

pytestmark = pytest.mark.usefixtures("one_device")

RUN = [*SMALL, "--config.checkpoint_every=2", "--config.checkpoints_to_keep=9"]
SIX_STEPS = "--config.steps=6"
SLOWER = ["--config.optimizer.learning_rate=1e-4", "--config.optimizer.gradient_clip_norm=0"]
ALLOWED = "--allow-changed=optimizer.learning_rate,optimizer.gradient_clip_norm"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_device) -> pathlib.Path:
    """The folder of a finished run of six steps with checkpoints 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("trained")
    assert main([*RUN, SIX_STEPS, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture
def run(trained, tmp_path) -> pathlib.Path:
    return shutil.copytree(trained, tmp_path / "run")


def steps_of(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def history_of(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "history.jsonl").read_text().splitlines()]


def test_a_run_goes_back_and_on_with_other_settings_once(trained, run, capsys):
    command = [*RUN, SIX_STEPS, *SLOWER, f"--workdir={run}", "--from-step=2", ALLOWED]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert f"went back to step 2; what later steps wrote is in {run}/superseded/from_step_2" in output
    assert "config.optimizer.learning_rate was 0.001 and is 0.0001 from step 2 on" in output
    assert "the learning rate of step 3 is " in output
    before, now = losses(trained), losses(run)
    assert now[1] == before[1] and now[3] == before[3]  # the update of step 3 is the first with the new rate
    assert now[4] != before[4]
    assert steps_of(run) == [2, 4, 6]
    assert steps_of(run / "superseded/from_step_2") == [4, 6]
    assert losses(run / "superseded/from_step_2") == before
    assert [(line["step"], line["from_step"]) for line in history_of(run)] == [(0, None), (2, 2)]
    assert history_of(run)[1]["changed"]["optimizer.learning_rate"] == [0.001, 0.0001]

    # A script that starts the same command again must not throw anything away.
    assert main(command) == 0
    assert "--from-step=2 was done at" in capsys.readouterr().out
    assert losses(run) == now and len(history_of(run)) == 2


def test_going_back_without_a_change_repeats_the_run(trained, run):
    assert main([*RUN, SIX_STEPS, f"--workdir={run}", "--from-step=4"]) == 0
    assert losses(run) == losses(trained)


def test_a_finished_run_is_extended(trained, run, capsys):
    assert main([*RUN, "--config.steps=8", f"--workdir={run}", "--allow-changed=steps"]) == 0
    assert "config.steps was 6 and is 8 from step 6 on" in capsys.readouterr().out
    assert {step: losses(run)[step] for step in range(1, 7)} == losses(trained)
    assert max(losses(run)) == 8
    assert main([*RUN, "--config.steps=8", f"--workdir={run}"]) == 0  # the new number is the run's now


def test_another_batch_size_goes_on_at_the_next_sample(run):
    larger = [*RUN, SIX_STEPS, f"--workdir={run}", "--from-step=4", "--config.global_batch_size=32"]
    assert main([*larger, "--allow-changed=global_batch_size"]) == 0
    saved = json.loads((run / "checkpoints/6/data/metadata").read_text())
    assert 4 * 16 + 2 * 32 in _numbers(saved)
    assert main([*RUN, SIX_STEPS, f"--workdir={run}", "--config.global_batch_size=32"]) == 0


def _numbers(tree: object) -> list[int]:
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in _numbers(value)]
    return [tree] if isinstance(tree, int) else []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (SLOWER, "go on with the new values: --allow-changed=optimizer.gradient_clip_norm,optimizer.learning_rate"),
        (["--config.seed=1"], "config (seed was 0 and is 1); choose another --workdir\n"),
        (["--from-step=3"], "has no checkpoint of this step, only of: 2, 4, 6"),
        (["--from-step=two"], "invalid int value: 'two'"),
        (["--allow-changed=optimizer.lr"], "did you mean optimizer.learning_rate?"),
        (["--allow-changed=seed"], "it cannot change: the order of the data"),
        (["--allow-changed=model.vision.width"], "it cannot change: it describes the model"),
        (["--config.data.skip_batches=3:3"], "config.data.skip_batches=3:3: 3:3 must be START:STOP"),
        (["--config.keep_every=3"], "config.keep_every=3 must be a multiple of config.checkpoint_every=2"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(run, capsys, arguments, expected):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main([*RUN, SIX_STEPS, f"--workdir={run}", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith("error: ") and error.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_every_key_can_be_allowed_or_has_a_reason():
    config, _, _ = parse_arguments(RUN)
    for name in flatten(config):
        try:
            check_allowed([name])
        except ValueError as error:
            assert "it cannot change: " in str(error)  # noqa: PT017


def batches(workdir: pathlib.Path, *arguments: str, steps: int = 5) -> list[np.ndarray]:
    """The images of each step of a new run."""
    config, _, _ = parse_arguments([*RUN, SIX_STEPS, *arguments])
    validate(config)
    feed = Feed(prepare(config, str(workdir)), 0)
    try:
        return [feed.next(step).inputs["image"] for step in range(steps)]
    finally:
        feed.close()


def test_skipped_batches_are_passed_over(tmp_path):
    all_batches = batches(tmp_path, steps=6)
    some = batches(tmp_path, "--config.data.skip_batches=0:1,2:4", steps=3)
    np.testing.assert_array_equal(some, [all_batches[1], all_batches[4], all_batches[5]])


def test_a_run_that_skips_batches_resumes_at_the_exact_sample(run):
    skipping = [*RUN, SIX_STEPS, f"--workdir={run}", "--from-step=2", "--config.data.skip_batches=3:5"]
    assert main(skipping) == 0
    first = losses(run)
    assert main([*skipping[:-2], "--from-step=4", skipping[-1]]) == 0
    assert losses(run) == first


def test_a_change_of_the_data_starts_a_new_order(trained, run, capsys):
    other = [
        *RUN,
        "--config.steps=8",
        "--allow-changed=steps",
        f"--workdir={run}",
        "--config.data.source=emoji:noto/train",
    ]
    assert main(other) == 2
    assert "go on with the new data: --config.data.allow_changed=true" in capsys.readouterr().err
    assert main([*other, "--config.data.allow_changed=true"]) == 0
    last = Segment(**history_of(run)[-1])
    assert (last.step, last.data_start, last.data_changes) == (6, 6 * 16, 1)
    assert max(losses(run)) == 8
    assert main([*other, "--config.data.allow_changed=true"]) == 0
    assert len(history_of(run)) == 2
    assert len({order_seed(0, changes) for changes in range(5)}) == 5


def test_multiples_are_kept_for_good(tmp_path):
    kept = ["--config.checkpoints_to_keep=1", "--config.keep_every=4"]
    assert main([*RUN, "--config.steps=7", *kept, f"--workdir={tmp_path}"]) == 0
    assert steps_of(tmp_path) == [4, 7]


def test_a_loss_that_is_not_finite_names_the_way_on(run, capsys):
    wild = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup_steps=0"]
    allowed = "--allow-changed=optimizer.learning_rate,optimizer.warmup_steps"
    assert main([*RUN, SIX_STEPS, *wild, allowed, f"--workdir={run}", "--from-step=2"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("failed: ") and "go on from step 2 with --from-step=2 --allow-changed=" in line
    assert main([*RUN, SIX_STEPS, f"--workdir={run}", "--from-step=2", allowed]) == 0
