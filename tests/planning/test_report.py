"""A report's arithmetic and its text."""

import json
import re

import pytest
from plans import facts, too_large

from clip_jax.models.presets import PRESETS
from clip_jax.planning import searching
from clip_jax.planning.model_flops import step_flops
from clip_jax.planning.report import format_report, make_report
from clip_jax.planning.topologies import GIB, parse_topology


def test_a_reports_arithmetic(config):
    config.global_batch_size, config.epochs = 1_000, 2.0
    report = make_report(config, parse_topology("v5e:2x2"), facts(), pairs=1_000_000, chip_hour_price=1.5)
    assert report["seconds"] == pytest.approx({"compute": 1.0, "collectives_at_least": 0.008, "step": 1.008})
    assert report["memory"] == {
        "parameters": 3 * GIB,
        "optimizer state": 6 * GIB,
        "batch": GIB,
        "padding": GIB,
        "results not in place": 0,
        "temporaries": 2 * GIB,
        "program": GIB,
        "all": 14 * GIB,
    }
    gather, reduce = report["collectives"]
    assert (gather["kind"], gather["count"], gather["overlapping"]) == ("all-gather", 3, 3)
    assert gather["seconds_at_least"] == pytest.approx(0.015) and gather["exposed_seconds"] == pytest.approx(0.003)
    assert reduce["exposed_seconds"] == pytest.approx(0.005)
    assert report["bytes_accessed_seconds"] == pytest.approx(1)
    assert report["seconds_by_part"] == pytest.approx({"vision tower": 0.8, "loss": 0.2})
    assert report["steps"] == 2_000
    assert report["days"] == pytest.approx(2_000 * 1.008 / 86_400)
    assert report["cost"] == pytest.approx(2_000 * 1.008 / 3600 * 4 * 1.5)
    assert report["pairs_per_second"] == pytest.approx(1_000 / 1.008)
    needed = report["model_flops"]["all"]
    assert needed * 4 == sum(step_flops(PRESETS["ViT-B/32"], 1_000).values())
    assert report["model_flops_utilization"] == pytest.approx(needed / 1.008 / 197e12)
    assert report["compiled_to_model_flops"] == pytest.approx(1e12 / needed)
    json.dumps(report)


def test_the_configs_steps_are_the_run_if_it_names_them(config):
    config.steps = 7
    report = make_report(config, parse_topology("v5e:2x2"), facts())
    assert (report["steps"], report["pairs"]) == (7, None)
    assert any("7 steps, " in line for line in format_report(report))


def test_steps_of_smaller_images_are_said_not_to_be_in_the_prediction(config):
    config.progressive_resolution.update(image_size=112, steps=1_000)
    text = "\n".join(format_report(make_report(config, parse_topology("v5e:2x2"), facts())))
    assert "the first 1,000 steps, of smaller images, take less" in text


def test_a_printed_report_says_what_it_stands_on(config):
    text = "\n".join(format_report(make_report(config, parse_topology("v5e:2x2"), facts(), chip_hour_price=1)))
    for part in ("It fits: 14.00 GiB of 16.00 GiB", "400,000,000 pairs, the paper's number", "prediction", "cost"):
        assert part in text
    assert "scatter" not in text and "sort (2 times)" in text and "gather (1 times)" in text


def test_what_does_not_fit_comes_with_the_largest_things_and_what_to_change(config):
    text = "\n".join(format_report(make_report(config, parse_topology("v5e:2x2"), too_large())))
    assert "does not fit: temporaries alone need 30.00 GiB of the 15.00 GiB" in text
    assert "f32[2,3]" in text
    config.model.remat = "full"
    assert "remat=" not in "\n".join(format_report(make_report(config, parse_topology("v5e:2x2"), too_large(False))))


@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:4x4x4", "v3:2x2"])
def test_a_report_of_a_tiny_step_prints_no_figure_as_zero(config, topology):
    """All but those that are zero; a collective of 4 bytes, a step of 8 pairs, a price of a millionth."""
    config = searching.with_values(config, global_batch_size=8 * parse_topology(topology).devices, steps=1)
    small = {"received_bytes": 4, "num_bytes": 4, "times": 1, "kind": "all-reduce", "asynchronous": False}
    program = facts()["program"] | {
        "cycles": [["loss", "forward", "matrix products", "exp", 1_000_000], ["loss", "", "other", "a", 1]],
        "collectives": [small | {"overlapped_cycles": 0, "group_size": 2, "op_name": ""}],
        "matmul_flops": 100,
        "hbm_bytes": 900,
    }
    memory = facts()["memory"] | {"temporaries": 3, "program": 1_200}
    report = make_report(config, parse_topology(topology), facts(program=program, memory=memory), chip_hour_price=1e-6)
    text = "\n".join(format_report(report))
    assert not re.search(r"(?<![\d.,])0(\.0+)?(?= *(%|[KMG]iB|s|ms|us|T|days|hours|pairs/s)\b|%)", text), text
    assert "'" not in text.replace("model's", "").replace("compiler's", "").replace("config's", "").replace(
        "paper's", ""
    ).replace("program's", "")
    assert f"on {topology} ({parse_topology(topology).accelerator_type})" in text
