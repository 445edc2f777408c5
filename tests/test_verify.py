"""``python -m clip_jax.verify`` reports every damage in the folder of a run, and changes nothing."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from benchmarks.checkpoint_damage import BATCH_SIZE, random_state
from clip_jax import verify
from clip_jax.run_folder import save_variables
from clip_jax.sharding import make_mesh, replicated
from clip_jax.training.checkpoint import Checkpointer
from clip_jax.training.state import TrainState

LONG = 3_000  # numbers, too many for orbax to store them in its index


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run with the checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("original")
    sharding = replicated(make_mesh(1, jax.devices()[:1]))
    arrays = {
        name: jax.ShapeDtypeStruct((LONG,), np.float32, sharding=sharding) for name in ("kernel", "scale", "moment")
    }
    moment = (arrays.pop("moment"),)
    template = TrainState(jax.ShapeDtypeStruct((), np.int32, sharding=sharding), arrays, {}, moment)
    checkpointer = Checkpointer(folder, keep=9)
    for step in (1, 2):
        checkpointer.save(step, random_state(template, step), step * BATCH_SIZE, "the-data")
        checkpointer.wait()
    checkpointer.close()
    (folder / "config.json").write_text(json.dumps({"global_batch_size": BATCH_SIZE}))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    return folder


@pytest.fixture
def run(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def verified(run, capsys) -> tuple[int, dict[str, str]]:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    code = verify.main([str(run)])
    output, errors = capsys.readouterr()
    assert errors == ""
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    return code, dict(line.split(": ", 1) for line in output.splitlines())


WHOLE = {
    "config.json": "whole",
    "metrics.jsonl": "2 lines",
    "checkpoints/1": "whole",
    "checkpoints/2": "whole",
}


def test_a_whole_run_is_whole(run, capsys):
    assert verified(run, capsys) == (0, WHOLE)


def test_every_damaged_array_is_named(run, capsys):
    for file in (run / "checkpoints/2/state/ocdbt.process_0/d").iterdir():
        content = np.frombuffer(file.read_bytes(), np.uint8).copy()
        content[1_000::5_000] ^= 1  # an array has about 11 kB
        file.write_bytes(content.tobytes())
    code, lines = verified(run, capsys)
    assert code == 1 and lines | {"checkpoints/2": "whole"} == WHOLE
    assert lines["checkpoints/2"].startswith("damaged: ")
    for name in ("params.kernel", "params.scale", "opt_state.0"):
        assert f"{name} differs from its digest" in lines["checkpoints/2"] or f"{name} cannot" in lines["checkpoints/2"]


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("data/metadata", "{}", "data/metadata is damaged: {'step': 2}"),
        ("data/metadata", None, "data/metadata cannot be read: No such file or directory"),
        ("state/_METADATA", "{", "state/_METADATA is not JSON"),
        ("state/digests/jax.Array-0.json", "[]", "state/digests/jax.Array-0.json is not a JSON object"),
    ],
)
def test_a_damaged_file_is_named(run, capsys, file, content, line):
    path = run / "checkpoints/2" / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert verified(run, capsys) == (1, WHOLE | {"checkpoints/2": f"damaged: {line}"})


def test_a_position_that_does_not_fit_the_config_is_damage(run, capsys):
    (run / "config.json").write_text(json.dumps({"global_batch_size": BATCH_SIZE + 1}))
    code, lines = verified(run, capsys)
    assert (code, lines["checkpoints/2"]) == (1, "damaged: its data position is 32, but 34 after 2 steps")


def test_a_checkpoint_in_the_folder_of_another_step_is_damage(run, capsys):
    shutil.copytree(run / "checkpoints/1", run / "checkpoints/3")
    code, lines = verified(run, capsys)
    assert (code, lines["checkpoints/3"]) == (1, "damaged: it holds step 1; it holds step 1")


@pytest.mark.parametrize(("content", "line"), [("[1]", "damaged: it is not a JSON object"), (None, "missing")])
def test_a_damaged_config_is_reported(run, capsys, content, line):
    (run / "config.json").unlink()
    if content:
        (run / "config.json").write_text(content)
    assert verified(run, capsys) == (1, WHOLE | {"config.json": line})


def test_a_damaged_history_is_reported(run, capsys):
    (run / "history.jsonl").write_text("{\n")
    code, lines = verified(run, capsys)
    assert code == 1 and "line 1 is damaged" in lines["history.jsonl"]
    assert lines["checkpoints/2"] == "whole"


def test_lines_of_the_metrics_that_a_kill_has_cut_are_no_damage(run, capsys):
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 2}\nnull\n')
    code, lines = verified(run, capsys)
    assert code == 0
    assert lines["metrics.jsonl"] == "4 lines, 2 of them unreadable and ignored: a kill can cut a line"


def test_a_checkpoint_of_an_earlier_version_is_read(run, capsys):
    state = {"step": np.int32([4]).reshape(()), "params": {"kernel": np.ones(LONG, np.float32)}}
    data = {"position": 4 * BATCH_SIZE, "data_fingerprint": "the-data"}
    with ocp.CheckpointManager(run / "checkpoints") as manager:
        manager.save(4, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)))
    code, lines = verified(run, capsys)
    assert (code, lines["checkpoints/4"]) == (0, "readable, but without digests: an earlier version saved it")


def test_converted_weights_have_no_data_position(tmp_path, capsys):
    save_variables(tmp_path, {"params": {"kernel": np.ones(LONG, np.float32)}, "batch_stats": {}})
    (tmp_path / "config.json").write_text("{}")
    assert verified(tmp_path, capsys) == (0, {"config.json": "whole", "checkpoints/0": "whole"})


def test_a_folder_without_a_run_is_a_mistake(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert verify.main([str(folder)]) == 2
        output, errors = capsys.readouterr()
        assert output == "" and errors == f"error: {folder} holds no run: neither config.json nor checkpoints/\n"
