"""The command: its mistakes, and, with libtpu, plans of small steps."""

import json

import numpy as np
import pytest

from clip_jax.plan import main
from clip_jax.planning import compiling
from clip_jax.planning.topologies import GIB

COMMAND = ["--config=configs/vit_b32.py", "--topology=v5e:2x2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v7:2x2"], "v2:AxB, v3:AxB, v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB"),
        (["--topology=v5litepod-12"], "of 12 chips; the nearest are v5litepod-8 (2x4) and v5litepod-16 (4x4)"),
        (["--topology=v5p-100"], "100 TensorCores, two on each chip; the nearest are v5p-64 (2x4x4) and v5p-128"),
        (["--topology=v6e-512"], "the nearest are v6e-256 (16x16)"),
        (["--topology=v5p-0"], "the nearest are v5p-8 (2x2x1)"),
        (["--topology=v3-33"], "the nearest are v3-32 (4x4) and v3-64 (4x8)"),
        (["--topology=V5P-128"], "did you mean v5p-128?"),
        (["--topology=v5litepod16"], "did you mean v5litepod-16?"),
        (["--topology=v5lite-16"], "did you mean v5litepod-16 or"),
        (["--topology=TPU v4-32"], "did you mean v4-32?"),
        (["--topology=v5e:16*16"], "did you mean v5e:16x16?"),
        (["--topology=v5p:8X8X4"], "did you mean v5p:8x8x4?"),
        (["--topology=4x4x4"], "did you mean v4:4x4x4 or v5p:4x4x4?"),
        (["--topology="], "no such slice. Slices are written"),
        (["--topology"], "argument --topology: expected one argument"),
        (["--topology=v5e:4x4x4"], "no such slice"),
        (["--topology=v5e:0x4"], "no such slice"),
        (["--chips=3"], "unknown argument --chips=3"),
        (["--config.mesh.fdsp=2"], "did you mean --config.mesh.fsdp"),
        (["--pairs=0"], "--pairs=0 must be positive"),
        (["--chip-hour-price=-1"], "--chip-hour-price"),
        (["--search=everything"], "--search"),
        (["--config.global_batch_size=1"], "must be at least 2"),
    ],
)
def test_a_mistake_is_told_in_a_line(capsys, arguments, message):
    assert main([*COMMAND, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_the_compiler_it_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert main(COMMAND) == 2
    assert 'pip install "clip-jax-tpu[tpu]"' in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], COMMAND[:1], COMMAND[1:]])
def test_a_flag_that_is_missing_is_told_in_a_line(capsys, arguments):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "required" in error and error.count("\n") == 1


SMALL = [
    "--config=configs/quickstart.py",
    "--config.model.dtype=bfloat16",
    "--config.model.vision.num_layers=3",
    "--config.model.text.num_layers=3",
    "--config.model.scan_unroll=1",  # one layer by itself, or the compiler undoes the remat
    "--config.model.remat=full",
    "--config.mesh.fsdp=2",
]


@pytest.mark.parametrize("topology", ["v5litepod-4", "v5p:2x2x1"])
def test_a_small_config_is_compiled_for_two_generations(capsys, monkeypatch, tmp_path, topology):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main([*SMALL, f"--topology={topology}", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] and report["mesh"] == {"data": 2, "fsdp": 2}
    assert 1 < report["compiled_to_model_flops"] < 1.4
    assert report["memory"]["all"] < GIB
    assert report["memory"]["parameters"] == pytest.approx(report["num_parameters"] * 2, rel=0.05)
    assert 1e-5 < report["seconds"]["step"] < 1e-1
    assert report["unknown_loops"] == 0 and report["is_scheduled"]
    assert {"vision tower", "text tower", "loss", "optimizer"} <= report["seconds_by_part"].keys()
    assert {"all-gather", "all-reduce", "reduce-scatter"} <= {one["kind"] for one in report["collectives"]}
    assert np.isfinite(report["days"])


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--topology=v5e:3x3"], {}, "near it are v5e:2x4 (v5litepod-8) and v5e:4x4 (v5litepod-16)"),
        (["--topology=v5e:2x2", "--config.mesh.fsdp=3"], {}, "config.mesh.fsdp=3 does not divide the 4 devices"),
        (["--topology=v5e:2x2", "--config.global_batch_size=10"], {}, "8 or 12 can"),
        (["--topology=v5e:2x2"], {"LIBTPU_INIT_ARGS": "--xla_no_such=1"}, "flag 'xla_no_such'"),
    ],
)
def test_what_only_the_compiler_knows_is_told_in_a_line_too(
    capsys, monkeypatch, tmp_path, arguments, environment, message
):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([*SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_step_that_does_not_fit_names_the_largest_arrays(capsys, monkeypatch, tmp_path):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    batch = ["--config.global_batch_size=262144", "--config.loss.form=gather"]
    assert main([*SMALL, "--topology=v5e:2x2", *batch]) == 1
    text = capsys.readouterr().out
    assert "It does not fit" in text and "f32[65536,262144]" in text and "--config.global_batch_size=" in text
    assert "--config.loss.form=blockwise" in text
