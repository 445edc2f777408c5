"""An evaluation gives one process's results on any number of them, each reading only its own part of the images."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from trial import SMALL, finish, kill, pod_variables, run, start, wait_for_step

EVALUATION = "--config.evaluation.tasks=emoji_unseen_both"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    """41 labeled images and a task over them."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, count in (("cat", 17), ("dog", 24)):
        (folder / name).mkdir()
        for number in range(count):
            pixels = random.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02}.png")
    task = {"name": "noise", "kind": "zero_shot", "source": f"image_folder:{folder}", "train": f"image_folder:{folder}"}
    (folder / "task.json").write_text(json.dumps(task))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("trained")
    run(*SMALL, "--config.steps=4", "--config.eval_every=2", EVALUATION, f"--workdir={workdir}")
    return workdir


def start_hosts(*arguments: str, processes: int, devices: int, caches: pathlib.Path) -> tuple[list[str], list[int]]:
    """What each host printed and how it ended; each has a cache of its own, as hosts with own disks have."""
    pod = pod_variables(processes) if processes > 1 else [{}]
    started = [
        start(*arguments, devices=devices, module="clip_jax.evaluate", **one, XDG_CACHE_HOME=f"{caches}/{number}")
        for number, one in enumerate(pod)
    ]
    try:
        return [finish(process) for process in started], [process.returncode for process in started]
    finally:
        for process in started:
            kill(process)


def evaluate(model: pathlib.Path, data: pathlib.Path, output: pathlib.Path, processes: int, devices: int) -> dict:
    tasks = f"{data}/task.json,emoji_unseen_both"
    arguments = [f"--model={model}", f"--tasks={tasks}", f"--output={output}", "--linear-probe", "--batch-size=24"]
    outputs, codes = start_hosts(*arguments, processes=processes, devices=devices, caches=output / "caches")
    assert not any(codes), outputs
    assert sum("noise, 41 images, 2 classes:" in printed for printed in outputs) == 1  # one host speaks
    return json.loads((output / "results.json").read_text())["tasks"]


def assert_same(one: dict, other: dict) -> None:
    for name, task in one.items():
        for part in ("metrics", "counts", "chance", "linear_probe"):
            assert other[name].get(part, {}) == pytest.approx(task.get(part, {}), rel=1e-5), (name, part)


@pytest.mark.parametrize(("processes", "devices"), [pytest.param(1, 8, marks=pytest.mark.slow), (2, 3)])
def test_eight_devices_and_two_processes_of_three_score_as_one_device_does(trained, data, tmp_path, processes, devices):
    one = evaluate(trained, data, tmp_path / "one", processes=1, devices=1)
    assert one["noise"]["linear_probe"].keys() > {"accuracy"}
    assert_same(one, evaluate(trained, data, tmp_path / "other", processes, devices))


def test_what_one_host_cannot_read_is_told_by_all_and_what_it_knows_is_known_to_all(trained, data, tmp_path):
    torn, twice = tmp_path / "torn", tmp_path / "twice"
    (torn / "cat").mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(torn / f"cat/{number:02}.png")
    (torn / "cat/11.png").write_bytes(b"no image")  # which the second host embeds
    tasks = [
        {"name": "torn", "kind": "zero_shot", "source": f"image_folder:{torn}"},
        {"name": "one", "kind": "zero_shot", "source": f"image_folder:{data}"},
        # The same names again, of which by now the first host alone has the embeddings on its disk.
        {"name": "other", "kind": "zero_shot", "source": f"image_folder:{data}"},
    ]
    twice.mkdir()
    (twice / "tasks.json").write_text(json.dumps(tasks))
    arguments = [f"--model={trained}", f"--tasks={twice}/tasks.json", f"--output={tmp_path}/out", "--batch-size=24"]
    outputs, codes = start_hosts(*arguments, processes=2, devices=1, caches=tmp_path / "caches")
    assert codes == [2, 2], outputs
    assert "error: torn: " in outputs[0] and "11.png: not an image" in outputs[0]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["tasks"]["one"]["metrics"] == results["tasks"]["other"]["metrics"]
    assert not (tmp_path / "caches/1/clip_jax/classifiers").exists()


@pytest.mark.slow
def test_a_pod_evaluates_during_training_as_one_process_does(trained, tmp_path):
    arguments = [*SMALL, "--config.steps=4", "--config.eval_every=2", EVALUATION, f"--workdir={tmp_path}"]
    processes = [start(*arguments, **one) for one in pod_variables(2)]
    outputs = [finish(process) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    for step in (2, 4):
        one, pod = (json.loads((folder / f"eval/{step}.json").read_text()) for folder in (trained, tmp_path))
        counts = one["tasks"]["emoji_unseen_both"]["counts"]
        assert counts == pod["tasks"]["emoji_unseen_both"]["counts"] == {"images": 205, "texts": 205}
        for metric, value in one["tasks"]["emoji_unseen_both"]["metrics"].items():
            # The two trainings differ in the last bits, so an image may change places with its neighbor.
            assert pod["tasks"]["emoji_unseen_both"]["metrics"][metric] == pytest.approx(value, abs=2.5 / 205), metric


def test_evaluations_after_a_resumption_are_those_of_the_run_that_was_never_killed(trained, tmp_path):
    first = [*SMALL, "--config.steps=4", EVALUATION, f"--workdir={tmp_path}", "--config.checkpoint_every=1"]
    process = start(*first, "--config.eval_every=0")
    wait_for_step(process, 3)
    kill(process)
    run(*first, "--config.eval_every=2")
    assert (
        json.loads((tmp_path / "eval/4.json").read_text())["tasks"]
        == (json.loads((trained / "eval/4.json").read_text())["tasks"])
    )
