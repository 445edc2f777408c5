"""A training whose first steps see smaller images: when they grow, and that it may be ended at any step."""

import shutil

import pytest
from trial import SMALL, losses

from clip_jax.main import main
from clip_jax.training import loop

ARGUMENTS = [
    *SMALL,
    "--config.steps=6",
    "--config.checkpoint_every=1",
    "--config.checkpoints_to_keep=9",
    "--config.progressive_resolution.image_size=8",
    "--config.progressive_resolution.steps=3",
]


@pytest.fixture
def sizes(monkeypatch):
    """The size of the images of each step that is taken from now on."""
    seen, to_global_batch = [], loop.to_global_batch

    def noting(batch, mesh):
        seen.append(batch["image"].shape[1])
        return to_global_batch(batch, mesh)

    monkeypatch.setattr(loop, "to_global_batch", noting)
    return seen


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert main([*ARGUMENTS, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.mark.parametrize("resumed_at", [2, *(pytest.param(step, marks=pytest.mark.slow) for step in (0, 3, 4))])
def test_images_grow_after_the_first_steps_wherever_the_training_was_ended(undisturbed, tmp_path, sizes, resumed_at):
    workdir = tmp_path / "run"
    if resumed_at:
        shutil.copytree(undisturbed, workdir)
        for step in range(resumed_at + 1, 7):
            shutil.rmtree(workdir / f"checkpoints/{step}")
        (workdir / "metrics.jsonl").write_text("")
    assert main([*ARGUMENTS, f"--workdir={workdir}"]) == 0
    assert sizes == [8, 8, 8, 16, 16, 16][resumed_at:]
    assert losses(workdir) == {step: loss for step, loss in losses(undisturbed).items() if step > resumed_at}


@pytest.mark.slow
def test_smaller_images_go_with_patch_dropout_and_accumulation(tmp_path, sizes):
    more = ["--config.accumulation_steps=2", "--config.model.patch_dropout=0.5"]
    curves = []
    for number, arguments in enumerate((more[1:], more)):
        assert main([*ARGUMENTS, *arguments, f"--workdir={tmp_path}/{number}"]) == 0
        curves.append(losses(tmp_path / str(number)))
    assert sizes == [8, 8, 8, 16, 16, 16] * 2
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_a_run_that_would_never_see_the_models_size_is_refused(tmp_path, capsys):
    assert main([*ARGUMENTS, "--config.steps=3", f"--workdir={tmp_path}/run"]) == 2
    assert "config.progressive_resolution.steps=3 must be below the run's 3 steps" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_training_at_one_size_takes_other_steps(undisturbed, tmp_path, sizes):
    arguments = [argument for argument in ARGUMENTS if "progressive" not in argument]
    assert main([*arguments, f"--workdir={tmp_path}"]) == 0
    assert sizes == [16] * 6
    assert losses(tmp_path)[1] != losses(undisturbed)[1]
