"""Tests how results are printed and written, with marks for values that do not exceed a reference."""

import json

import pytest
from etils import epath

from clip_jax.evaluation.results import MissingTask, Results, TaskResult, main_metric, not_above, write_results


def task(**changes):
    values = {
        "metrics": {"top_1": 0.125, "mean_per_class": 0.15, "calibration_error": 0.3},
        "counts": {"images": 1_906, "classes": 9},
        "chance": {"top_1": 1 / 9, "mean_per_class": 1 / 9},
        "largest_class": {"top_1": 0.2025, "mean_per_class": 1 / 9},
        "linear_probe": {"accuracy": 0.2, "mean_per_class": 0.35, "C": 0.316},
    }
    return TaskResult("groups", "Groups", "zero_shot", "top_1", **(values | changes))


def test_the_table_marks_values_that_do_not_exceed_a_reference():
    lines = Results("model", "ViT", [task()], [MissingTask("food", "Food", "no folder", "")]).table().splitlines()
    head, *rows, missing = [line.split() for line in lines]
    assert head == ["groups,", "1,906", "images,", "9", "classes:", "largest", "class", "chance"]
    assert rows == [
        ["top_1", "12.50%", "20.25%", "11.11%", "(not", "above", "largest", "class)"],
        ["mean_per_class", "15.00%", "11.11%", "11.11%"],
        ["calibration_error", "30.00%"],
        ["linear", "probe,", "accuracy", "20.00%", "20.25%", "11.11%", "(not", "above", "largest", "class)"],
        ["linear", "probe,", "mean_per_class", "35.00%", "11.11%", "11.11%"],
        ["linear", "probe,", "C:", "0.316"],
    ]
    assert missing[:5] == ["food", "was", "not", "scored:", "no"]


def test_the_log_line_of_a_training_has_the_mark():
    assert main_metric(task()) == "groups top_1 12.5% (not above largest class)"
    assert main_metric(task(metrics={"top_1": 0.3})) == "groups top_1 30.0%"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.31, []),
        (0.3, ["largest class"]),  # equal is not above
        (0.2, ["largest class"]),
        (0.1, ["largest class", "chance"]),
        (float("nan"), []),
        (None, []),
    ],
)
def test_a_value_that_is_not_above_a_reference_is_marked(value, expected):
    assert not_above({"chance": {"top_1": 0.1}, "largest_class": {"top_1": 0.3}}, "top_1", value) == expected
    assert not_above({"chance": {"top_1": 0.1}}, "roc_auc", value) == []


def test_results_are_written_with_their_references_and_marks(tmp_path):
    write_results(epath.Path(tmp_path), Results("model", "ViT", [task(identity={"images": "1"}, notes=["a note"])]))
    record = json.loads((tmp_path / "results.json").read_text())["tasks"]["groups"]
    assert record["largest_class"] == {"top_1": 0.2025, "mean_per_class": 1 / 9}
    assert record["not_above"] == ["largest class"] and record["notes"] == ["a note"]
    assert record["identity"] == {"images": "1"}
