"""The benchmark of one accelerator runs all of its parts on both sides, at small sizes on a CPU."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks.accelerator import plan
from benchmarks.accelerator_report import PARTS, tables

pytest.importorskip("torch")
pytest.importorskip("open_clip")

REPOSITORY = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_parts_run_on_both_sides(tmp_path):
    output = tmp_path / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device, as a user's
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerator", "--small", f"--output={output}"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert [item for item in report["measurements"] if item["status"] != "ok"] == []
    assert len(report["measurements"]) == sum(len(duel.settings) for duel in plan(PARTS, small=True))
    both = [entry for entry in report["summary"] if entry["case"].get("caches") != "filled"]
    assert {entry["part"] for entry in both} == set(PARTS) - {"check"}
    for entry in both:
        assert entry["ratio"] > 0
    losses = [item for item in report["measurements"] if item["part"] == "loss"]
    exact = [item["loss"] for item in losses if item["setting"].get("precision") != "bfloat16"]
    assert max(exact) - min(exact) < 1e-4
    assert {"torch", "open_clip", "jax"} <= set(report["versions"])
    assert done.stdout == tables(report)
