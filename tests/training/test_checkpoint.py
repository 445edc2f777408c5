"""A damaged checkpoint is never restored: the one before it is."""

import dataclasses
import json
import logging
import random
import re
import shutil
import threading
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import checkpoint_damage
from benchmarks.checkpoint_damage import KINDS, trial
from clip_jax import saved_arrays
from clip_jax.digests import DamagedError, digest, seal
from clip_jax.run_folder import CheckpointError, restore_variables, saved_fingerprint
from clip_jax.training.checkpoint import Checkpointer
from clip_jax.training.state import TrainState

SPECS = {
    "step": PartitionSpec(),
    "params": {"scale": PartitionSpec(), "kernel": PartitionSpec(None, "fsdp"), "table": PartitionSpec("fsdp")},
    "opt_state": (PartitionSpec("fsdp"),),
}
SHAPES = {"step": (), "params": {"scale": (), "kernel": (6, 8), "table": (16, 4)}, "opt_state": ((8, 3),)}
DTYPES = {"step": np.int32, "params": {"scale": np.float32, "kernel": np.float32, "table": jax.numpy.bfloat16}}
DTYPES |= {"opt_state": (np.float32,)}


def template_on(mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state of a few numbers."""
    leaves = jax.tree.map(
        lambda spec, shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec)),
        SPECS,
        SHAPES,
        DTYPES,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )
    return TrainState(leaves["step"], leaves["params"], {}, leaves["opt_state"])


@pytest.fixture
def template(mesh_of):
    return template_on(mesh_of((1, 1)))


def state_of(template: TrainState, step: int) -> TrainState:
    return checkpoint_damage.random_state(template, step)


def save(folder, template, *steps, position=None):
    checkpointer = Checkpointer(epath.Path(folder), keep=9)
    for step in steps:
        checkpointer.save(step, state_of(template, step), 16 * step if position is None else position, "the-data")
        checkpointer.wait()
    checkpointer.close()


def restore(folder, template):
    checkpointer = Checkpointer(epath.Path(folder), 9, lambda step: 16 * step)
    try:
        return checkpointer.restore_latest(template)
    finally:
        checkpointer.close()


def assert_is(restored, template, step):
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(template, step))
    assert (restored.position, restored.data_fingerprint) == (16 * step, "the-data")


def rewrite(file, change):
    content = json.loads(file.read_text())
    content.pop("digest", None)
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("before", [(1, 1), (2, 4), (8, 1)])
@pytest.mark.parametrize("after", [(1, 1), (2, 4), (1, 2)])
def test_digests_hold_on_any_mesh(mesh_of, tmp_path, monkeypatch, before, after):
    monkeypatch.setitem(saved_arrays.ARRAY_OPTIONS, "min_slice_bytes_for_replica_parallel", 0)  # replicas share a save
    save(tmp_path, template_on(mesh_of(before)), 3)
    template = template_on(mesh_of(after))
    assert_is(restore(tmp_path, template), template, 3)
    digests = saved_arrays.read_digests(epath.Path(tmp_path) / "checkpoints/3/state")
    pieces = {name: len(saved.pieces) for name, saved in digests.items()}
    expected = {(1, 1): 1, (2, 4): 8, (8, 1): 8}[before]
    assert pieces["params.table"] == expected
    rewritten = {"params.table": dict.fromkeys(digests["params.table"].pieces, "0" * 32)}

    def spoil(directory):
        saved = digests["params.table"]
        return digests | {"params.table": saved.__class__(saved.shape, saved.dtype, rewritten["params.table"])}

    monkeypatch.setattr(saved_arrays, "read_digests", spoil)
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        restore(tmp_path, template)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_any_kind_is_noticed_or_changes_nothing(tmp_path_factory, template, kind):
    folder, rng = tmp_path_factory.mktemp("run"), random.Random(kind)
    states = checkpoint_damage.save_both(folder, template)
    for _ in range(6):
        file, result = trial(folder, template, states, kind, rng)
        assert result in ("same", "noticed"), file


@pytest.mark.slow
def test_no_flip_restores_a_wrong_value(tmp_path, template):
    rng, states = random.Random(0), checkpoint_damage.save_both(tmp_path, template)
    results = [trial(tmp_path, template, states, "flip", rng) for _ in range(500)]
    assert {result for _, result in results} == {"same", "noticed"}


def test_a_damaged_array_is_named_and_its_checkpoint_is_set_aside(tmp_path, template, caplog, monkeypatch):
    save(tmp_path, template, 1, 2)
    monkeypatch.setattr(saved_arrays, "check", _damaged("params.kernel", saved_arrays.check, step=2, tree=template))
    with caplog.at_level(logging.WARNING, "clip_jax"):
        assert_is(restore(tmp_path, template), template, 1)
    assert caplog.messages == ["checkpoint 2 is damaged and is skipped: params.kernel differs from its digest"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1"]
    assert (tmp_path / "damaged_checkpoint_2/state").is_dir()


def _damaged(name, check, step, tree):
    """Returns ``check`` with one bit of one array flipped, in the checkpoint of this step."""
    expected = np.asarray(state_of(tree, step).params["kernel"])

    def flipped(array_name, saved, parts):
        if array_name == name and any(digest(expected) == one for one in saved.pieces.values()):
            parts = {box: part.copy() for box, part in parts.items()}
            for part in parts.values():
                part.view(np.uint32)[0, 0] ^= 1
        check(array_name, saved, parts)

    return flipped


def test_arrays_of_an_older_checkpoint_are_noticed(tmp_path, template, caplog):
    save(tmp_path, template, 1, 2)
    for name in ("state", "data"):
        copy = tmp_path / name
        shutil.copytree(tmp_path / "checkpoints", copy / "checkpoints")
        shutil.rmtree(copy / f"checkpoints/2/{name}")
        shutil.copytree(copy / f"checkpoints/1/{name}", copy / f"checkpoints/2/{name}")
        caplog.clear()
        assert_is(restore(copy, template), template, 1)
        assert caplog.messages == ["checkpoint 2 is damaged and is skipped: it holds step 1"]
    caplog.clear()
    assert float(restore_variables(tmp_path / "state")["params"]["scale"]) == float(
        state_of(template, 1).params["scale"]
    )


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_state_that_is_not_finite_is_skipped(tmp_path, template, caplog, value):
    save(tmp_path, template, 1)
    state = state_of(template, 2)
    state.params["kernel"] = state.params["kernel"].at[3, 3].set(value)
    checkpointer = Checkpointer(epath.Path(tmp_path), keep=9)
    checkpointer.save(2, state, 32, "the-data")
    checkpointer.close()
    assert_is(restore(tmp_path, template), template, 1)
    assert caplog.messages == ["checkpoint 2 is damaged and is skipped: params.kernel has values that are not finite"]


def test_a_position_that_does_not_fit_the_step_is_damage(tmp_path, template, caplog):
    save(tmp_path, template, 1)
    save(tmp_path, template, 2, position=31)
    assert_is(restore(tmp_path, template), template, 1)
    assert caplog.messages == ["checkpoint 2 is damaged and is skipped: its data position is 31, but 32 after 2 steps"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "data/metadata is not a JSON object"),
        ("null", "data/metadata is not a JSON object"),
        (json.dumps(seal({"step": 2, "position": 32})), "data/metadata is damaged: {'step': 2, 'position': 32}"),
        (
            json.dumps({"step": 2, "position": 32, "data_fingerprint": "the-data", "digest": "0"}),
            "data/metadata differs",
        ),
        (json.dumps({"position": 32, "data_fingerprint": "the-data"}), "data/metadata has no digest, but the arrays"),
        (json.dumps({"position": 32}), "data/metadata is damaged: {'position': 32, 'step': 2}"),
        (json.dumps({"position": "32", "data_fingerprint": "the-data"}), "data/metadata is damaged: "),
    ],
)
def test_a_damaged_position_or_fingerprint_takes_the_checkpoint_before(tmp_path, template, caplog, text, reason):
    save(tmp_path, template, 1, 2)
    (tmp_path / "checkpoints/2/data/metadata").write_text(text)
    assert saved_fingerprint(epath.Path(tmp_path)) == "the-data"
    assert_is(restore(tmp_path, template), template, 1)
    [line] = caplog.messages
    assert line.startswith(f"checkpoint 2 is damaged and is skipped: {reason}")


def test_a_checkpoint_whose_digests_are_deleted_is_damaged(tmp_path, template, caplog):
    save(tmp_path, template, 1, 2)
    shutil.rmtree(tmp_path / "checkpoints/2/state/digests")
    restore_variables(tmp_path)
    assert_is(restore(tmp_path, template), template, 1)
    assert caplog.messages == ["checkpoint 2 is damaged and is skipped: state/digests is missing"] * 2


def test_a_checkpoint_of_an_earlier_version_is_restored_with_a_line(tmp_path, template, caplog):
    state = state_of(template, 2)
    saved = {name: value for name, value in state._asdict().items() if name != "batch_stats"}
    data = {"position": 32, "data_fingerprint": "the-data"}
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(2, args=ocp.args.Composite(state=ocp.args.StandardSave(saved), data=ocp.args.JsonSave(data)))
    assert_is(restore(tmp_path, template), template, 2)
    line = "checkpoint 2 was saved by an earlier version, without digests, and cannot be verified"
    assert [message for message in caplog.messages if "checkpoint" in message] == [line]
    rewrite(tmp_path / "checkpoints/2/data/metadata", lambda content: content.update(position=33))
    with pytest.raises(CheckpointError):
        restore(tmp_path, template)


def test_digests_are_written_before_a_checkpoint_is_complete(tmp_path, template, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    save(tmp_path, template, 1)
    monkeypatch.setattr(saved_arrays, "to_json", fail)
    checkpointer = Checkpointer(epath.Path(tmp_path), keep=9)
    checkpointer.save(2, state_of(template, 2), 32, "the-data")
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpointer.wait()
    checkpointer.close()
    assert_is(restore(tmp_path, template), template, 1)


class Device:
    def __init__(self, process_index: int):
        self.process_index = process_index


def test_a_piece_that_no_host_holds_is_read_by_one_of_them(monkeypatch):
    """Two hosts of two devices, each with a quarter of the rows; the array was saved in pieces of half the columns."""
    devices = [Device(number // 2) for number in range(4)]
    sharding = SimpleNamespace(
        devices_indices_map=lambda shape: {
            device: (slice(2 * number, 2 * number + 2), slice(None)) for number, device in enumerate(devices)
        }
    )
    array = SimpleNamespace(sharding=sharding, shape=(8, 4))
    pieces = [((0, 8), (0, 2)), ((0, 8), (2, 4))]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    reads = {}
    for host in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        reads[host] = [saved_arrays._reads(number, array, piece) for number, piece in enumerate(pieces)]
        assert not saved_arrays._reads(host, array, ((0, 4), (0, 4)))  # the first host holds both halves of this one
        assert not saved_arrays._reads(host, array, ((6, 7), (1, 2)))
    assert reads == {0: [True, False], 1: [False, True]}


def test_files_that_cannot_be_read_are_a_line_that_names_the_array(tmp_path, template, caplog):
    save(tmp_path, template, 1, 2)
    for file in (tmp_path / "checkpoints/2/state").rglob("d/*"):
        file.write_bytes(b"")
    assert_is(restore(tmp_path, template), template, 1)
    [line] = caplog.messages
    assert line.startswith("checkpoint 2 cannot be read and is skipped: ")
    assert re.search(r"(step|scale|kernel|table|opt_state\.0)/", line) and "\n" not in line


def test_a_step_that_takes_the_memory_of_a_state_being_saved_changes_neither_the_files_nor_the_digests(
    tmp_path, template, monkeypatch
):
    state = state_of(template, 1)
    checkpointer = Checkpointer(epath.Path(tmp_path), keep=9)
    released, read = threading.Event(), saved_arrays.digest
    monkeypatch.setattr(saved_arrays, "digest", lambda array: released.wait() and read(array))
    checkpointer.save(1, state, 16, "the-data")
    step = jax.jit(lambda state: jax.tree.map(lambda array: array + 1, state), donate_argnums=0)
    for _ in range(3):
        state = jax.block_until_ready(step(state))
    released.set()
    checkpointer.close()
    assert_is(restore(tmp_path, template), template, 1)


def test_an_array_of_another_shape_than_its_digest_is_damage(tmp_path, template, monkeypatch):
    save(tmp_path, template, 1)
    directory = epath.Path(tmp_path) / "checkpoints/1/state"
    digests = saved_arrays.read_digests(directory)
    kernel = digests["params.kernel"]
    other = digests | {"params.kernel": dataclasses.replace(kernel, shape=(7, 8), pieces={((0, 7), (0, 8)): "0"})}
    monkeypatch.setattr(saved_arrays, "read_digests", lambda _: other)
    line = r"params\.kernel has the shape \[6, 8\], but \[7, 8\] was saved"
    with pytest.raises(DamagedError, match=line):
        saved_arrays.restore_as_numpy(directory, ["params"])
    wanted = {name: leaf for name, leaf in template._asdict().items() if name != "batch_stats"}
    with pytest.raises(DamagedError, match=line):
        saved_arrays.restore_like(directory, wanted)
