"""The benchmark of one accelerator says what it measured, what did not fit, and what is not there."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from trial import QUICK_COMPILATION

from benchmarks import accelerator
from benchmarks.accelerator import Bench, Duel, measure_all, next_batch, plan, refusal, run_alone
from benchmarks.accelerator_report import best, label, left_out, number, ratio, summarize, tables, with_shares
from benchmarks.accelerator_timing import NotThereError, config_of, status_of, timed
from clip_jax.losses.softmax import FORMS
from clip_jax.models.execution import REMAT_POLICIES

REPOSITORY = pathlib.Path(__file__).parent.parent.parent
WITHOUT_TORCH = "not there: No module named 'torch'"
STEP = {"part": "step", "case": {"model": "ViT-L/14"}, "status": "ok"}
OURS = STEP | {"side": "clip_jax", "peak_bytes": 30e9, "model_flops": 4e14}
THEIRS = STEP | {"side": "open_clip", "peak_bytes": 60e9, "model_flops": 2e14}
PRODUCT = {"part": "ceilings", "side": "jax", "case": {"what": "matrix product", "size": 8_192}, "setting": {}}


def environment_of_a_user() -> dict[str, str]:
    """Without the virtual devices that the tests have."""
    return os.environ | {"XLA_FLAGS": QUICK_COMPILATION}


def step_of(side: dict, batch_size: int, seconds: float, **setting) -> dict:
    numbers = {"seconds": seconds, "rate": batch_size / seconds}
    return side | {"setting": {"batch_size": batch_size, **setting}} | numbers


@pytest.fixture
def report() -> dict:
    """Of an accelerator that was taken away before all was measured."""
    measurements = with_shares(
        [
            PRODUCT | {"status": "ok", "seconds": 1e-3, "rate": 8e14},
            PRODUCT | {"side": "pytorch", "status": "ok", "seconds": 2e-3, "rate": 4e14},
            step_of(OURS, 256, 1.0, remat="lite", loss="gather"),
            step_of(OURS, 512, 1.6, remat="lite", loss="gather"),
            OURS | {"setting": {"batch_size": 1_024, "remat": "lite", "loss": "gather"}, "status": "does not fit"},
            step_of(THEIRS, 256, 2.0, compiled=True, checkpointing=False),
            step_of(THEIRS, 512, 3.2, compiled=True, checkpointing=True),
            {"part": "embed", "side": "clip_jax", "case": {"model": "RN50", "input": "texts"}, "status": "no time"}
            | {"setting": {"batch_size": 64, "precision": "bfloat16"}},
            {"part": "embed", "side": "open_clip", "case": {"model": "RN50", "input": "texts"}, "status": "no time"}
            | {"setting": {"batch_size": 64, "precision": "bfloat16", "compiled": True}},
        ]
    )
    return {
        "date": "2026-11-24T00:00:00+00:00",
        "command": "python -m benchmarks.accelerator",
        "device": {"platform": "gpu", "kind": "An accelerator", "count": 1},
        "versions": {"jax": "1", "torch": "2"},
        "missing": [],
        "measurements": measurements,
        "left_out": [],
        "summary": summarize(measurements),
    }


@pytest.mark.slow
def test_without_pytorch_a_small_run_measures_ours_and_says_what_is_missing(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    output = tmp_path / "report.json"
    command = ["-m", "benchmarks.accelerator", "--small", "--only=check,loss", f"--output={output}"]
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}  # so it is not found where it is there
    done = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=environment_of_a_user() | paths,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert {"date", "device", "versions", "command", "environment", "measurements", "summary"} <= set(report)
    assert report["device"]["platform"] == "cpu"
    assert report["left_out"] == []
    expected = [
        (duel.part, side)
        for duel in plan(["check", "loss"], small=True)
        for side, _ in duel.settings
        if side in ("jax", "clip_jax")
    ]
    measured = [item for item in report["measurements"] if item["side"] in ("jax", "clip_jax")]
    assert sorted((item["part"], item["side"]) for item in measured) == sorted(expected)
    for item in measured:
        assert item["status"] == "ok", item
        assert item["seconds"] > 0
        assert item["rate"] > 0
    theirs = [item for item in report["measurements"] if item["side"] in ("pytorch", "open_clip")]
    assert {item["status"] for item in theirs} == {WITHOUT_TORCH}
    assert {item["part"] for item in theirs} == {"loss"}
    losses = {item["loss"] for item in measured if item["part"] == "loss"}
    assert max(losses) - min(losses) < 1e-5
    (check,) = (item for item in measured if item["part"] == "check")
    assert check["difference"] == 0  # a CPU has one form of attention
    assert f"- pytorch: {WITHOUT_TORCH}" in done.stdout.splitlines()
    assert done.stdout == tables(report)


def test_a_cpu_is_refused_in_one_line_unless_it_is_asked_for():
    assert refusal("gpu", small=False) is refusal("tpu", small=False) is refusal("cpu", small=True) is None
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerator"],
        cwd=REPOSITORY,
        env=environment_of_a_user(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [refusal("cpu", small=False)]
    assert done.stdout == ""


@pytest.mark.parametrize("option", ["--only=steps", "--models=ViT-L/15"])
def test_a_part_or_model_that_is_not_there_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        accelerator.main([option])
    assert option.partition("=")[2] in capsys.readouterr().err


def settings_of(duels: list[Duel], what: str | int) -> list[dict]:
    return [setting for duel in duels if what in duel.case.values() for _, setting in duel.settings]


def test_the_plan_has_every_policy_and_form_of_the_config_and_starts_with_the_largest_model():
    duels = plan(accelerator.PARTS)
    assert duels[0].part == "check"
    steps = [duel for duel in duels if duel.part == "step"]
    assert [duel.case["model"] for duel in steps[:4]] == ["ViT-L/14"] * 4
    for model in accelerator.MODELS:
        settings = [item for duel in steps if duel.case["model"] == model for item in duel.settings]
        ours = {(setting["remat"], setting["loss"]) for side, setting in settings if side == "clip_jax"}
        assert ours == {(policy, form) for policy in REMAT_POLICIES for form in FORMS if form != "auto"}
        theirs = [setting for side, setting in settings if side == "open_clip"]
        assert len(theirs) == (6 if model == "RN50" else 4)
    others = [item for item in settings_of(duels, "ViT-L/14") if {"scan_unroll", "fused_attention"} & set(item)]
    assert [item.get("fused_attention", True) for item in others] == [True, False]  # the backend's choices taken back
    assert {duel.case["pairs"] for duel in duels if duel.part == "loss"} == {8_192, 32_768, 131_072}
    blocks = {setting["block_size"] for setting in settings_of(duels, 131_072) if "block_size" in setting}
    assert blocks == set(accelerator.BLOCK_SIZES)
    assert {duel.part for duel in plan(["loss", "start"])} == {"loss", "start"}
    config = config_of({"model": "RN50"}, {"batch_size": 256, "remat": "full", "loss": "blockwise"})
    assert (config.global_batch_size, config.model.remat, config.loss.form) == (256, "full", "blockwise")
    assert config.model.fused_attention
    assert not config_of({"model": "RN50"}, {"batch_size": 256, "fused_attention": False}).model.fused_attention


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        ([], 64),
        ([(64, "ok")], 128),
        ([(64, "ok"), (128, "ok")], 256),
        ([(64, "ok"), (128, "does not fit")], 0),
        ([(64, "does not fit")], 32),
        ([(64, "does not fit"), (32, "ok")], 0),
        ([(8, "does not fit")], 0),
        ([(64, "failed: it broke")], 0),
        ([(64, "ok"), (128, "no time")], 0),
        ([(256, "ok")], 0),
    ],
)
def test_batches_double_until_one_does_not_fit(tried, expected):
    assert next_batch(Duel("step", {}, (), 64, 256), tried) == expected


def sizes_that_fit(largest: dict[str, int]):
    """Measures by a formula: a side's largest batch, and a rate that stops growing at 64."""

    def measure(spec: dict) -> dict:
        size = spec["setting"].get("batch_size", 1)
        return {"status": "ok", "rate": min(size, 64)} if size <= largest[spec["side"]] else {"status": "does not fit"}

    return measure


def test_sides_take_turns_and_what_brings_nothing_more_waits_for_the_rest():
    both = (("clip_jax", {}), ("open_clip", {}))
    duels = [Duel("step", {"model": "A"}, both, 32, 1_024), Duel("loss", {"pairs": 8}, both)]
    measured = list(measure_all(duels, sizes_that_fit({"clip_jax": 256, "open_clip": 128}), lambda: 1_000))
    order = [(item["part"], item["side"], item["setting"].get("batch_size")) for item in measured]
    assert order == [
        *(("step", side, size) for size in (32, 64, 128) for side in ("clip_jax", "open_clip")),
        ("loss", "clip_jax", None),
        ("loss", "open_clip", None),
        ("step", "clip_jax", 256),
        ("step", "open_clip", 256),
        ("step", "clip_jax", 512),
    ]
    assert [item["status"] for item in measured if item["status"] != "ok"] == ["does not fit"] * 2


def test_what_the_budget_does_not_reach_is_listed():
    left = iter([100, 50, 10, 5])
    both = (("clip_jax", {"remat": "none"}), ("open_clip", {"compiled": True}))
    duels = [Duel("step", {"model": "A"}, both, 32, 32), Duel("step", {"model": "B"}, both, 32, 1_024)]
    measured = list(measure_all(duels, sizes_that_fit({"clip_jax": 64, "open_clip": 64}), lambda: next(left)))
    assert [item["status"] for item in measured] == ["ok", "ok", "no time", "no time"]
    assert left_out(measured) == ["step B (2 settings)"]


def test_what_another_report_has_is_not_measured_again():
    both = (("clip_jax", {}), ("open_clip", {}))
    duels = [Duel("step", {"model": "A"}, both, 32, 64)]
    first = list(measure_all(duels, sizes_that_fit({"clip_jax": 64, "open_clip": 32}), lambda: 1_000))
    unfinished = [item | {"status": "no time"} if item["setting"]["batch_size"] == 64 else item for item in first]
    asked: list[dict] = []

    def measure(spec: dict) -> dict:
        asked.append(spec)
        return {"status": "ok", "rate": 7}

    second = list(measure_all(duels, measure, lambda: 1_000, unfinished))
    assert [spec["setting"]["batch_size"] for spec in asked] == [64, 64]
    assert [item["rate"] for item in second] == [32, 32, 7, 7]
    # Without time left what is known is still told.
    assert [i["status"] for i in measure_all(duels, measure, lambda: 0, first)] == ["ok", "ok", "ok", "does not fit"]


def test_a_process_that_takes_too_long_is_ended_and_said_to_be():
    spec = {"part": "ceilings", "side": "jax", "case": {"what": "copy", "size": 64}, "setting": {}}
    assert run_alone(spec, 0.2, dict(os.environ)) == {"status": "failed: not done within 0 s"}


def test_a_process_that_dies_costs_only_itself(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os; os.kill(os.getpid(), 9)")
    result = run_alone({"part": "ceilings"}, 60, os.environ | {"PYTHONPATH": str(tmp_path)})
    assert result == {"status": "failed: ended by signal 9: without a message"}


def test_a_peer_that_is_not_there_is_not_started(tmp_path):
    bench = Bench(small=True, seconds=None, caches=tmp_path)
    bench.found = {"missing": {"open_clip": WITHOUT_TORCH}, "device": {"platform": "gpu"}}
    assert bench.measure({"side": "open_clip"}) == {"status": WITHOUT_TORCH}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."), "does not fit"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), "does not fit"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate"), "does not fit"),
        (MemoryError(), "does not fit"),
        (ModuleNotFoundError("No module named 'torch'"), WITHOUT_TORCH),
        (NotThereError("PyTorch 2 sees no gpu"), "not there: PyTorch 2 sees no gpu"),
        (ValueError("one line\nand another"), "failed: ValueError: one line and another"),
    ],
)
def test_errors_say_what_became_of_a_measurement(error, status):
    assert status_of(error) == status


def test_rounds_end_with_the_time_that_there_is():
    waited = []
    spec = {"rounds": 5, "round_limit_s": 60.0, "finish_by": float("inf")}
    result = timed(lambda: "output", waited.append, spec, lambda: {"peak_bytes": len(waited)})
    assert result["rounds"] == 5
    assert set(waited) == {"output"}
    assert result["peak_bytes"] == 3  # read after warming up
    assert timed(lambda: None, waited.append, spec | {"finish_by": 0.0})["rounds"] == 1


def test_each_side_is_judged_by_its_best(report):
    entry = next(entry for entry in report["summary"] if entry["part"] == "step")
    assert entry["clip_jax"]["setting"]["batch_size"] == 512
    assert entry["open_clip"]["setting"]["checkpointing"]
    assert entry["ratio"] == pytest.approx(2)
    assert entry["memory_ratio"] == pytest.approx(0.5)
    assert entry["clip_jax"]["matrix_share"] == pytest.approx(4e14 / 1.6 / 8e14)
    assert best([]) is ratio(None, entry["open_clip"]) is ratio(entry["clip_jax"], None) is None


def test_without_the_ceilings_there_is_no_share():
    (item,) = with_shares([step_of(OURS, 256, 1.0)])
    assert item["matrix_share"] is None


def test_the_tables_are_those_of_the_docs(report, tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert accelerator.main([f"--table={tmp_path}/report.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "`python -m benchmarks.accelerator`; An accelerator, 2026-11-24, jax 1, torch 2"
    assert "| matrix product | 800 TFLOP/s in bfloat16 | 400 TFLOP/s in bfloat16 |" in lines
    assert "| ViT-L/14 | clip_jax | remat lite, loss gather | 512 | 320.0 | 30.0 GB | 31 % | 2.00 |" in lines
    assert "|  | open_clip | compiled, checkpointing | 512 | 160.0 | 60.0 GB | 8 % |  |" in lines
    row = "| clip_jax remat lite, loss gather | 256.0 (30.0 GB) | 320.0 (30.0 GB) | does not fit |"
    assert row in lines
    assert lines[-1] == "- no time for: embed RN50 texts (2 settings)"


def test_a_setting_is_named_by_what_differs_from_the_usual():
    assert label({"batch_size": 8, "remat": "lite", "fused_attention": False}) == "remat lite, attention not fused"
    assert label({"compiled": False, "checkpointing": True}) == "eager, checkpointing"
    assert label({"loss": "blockwise", "block_size": 1_024}) == "loss blockwise, block_size 1024"


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.04321, "0.0432"), (1.0, "1.00"), (99.96, "100"), (1234.5, "1,230")]
)
def test_numbers_have_three_digits_that_mean_something(value, text):
    assert number(value) == text
