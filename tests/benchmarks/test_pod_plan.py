"""The table of docs/pods.md: which rows are in it, and the benchmark's flags. Nothing is compiled."""

import pytest

from benchmarks import pod_plan
from clip_jax.planning.compiling import PlanError


@pytest.fixture
def page(tmp_path, monkeypatch):
    page = tmp_path / "pods.md"
    page.write_text(f"before\n{pod_plan.BEGIN}\nold\n{pod_plan.END}\nafter\n")
    monkeypatch.setattr(pod_plan, "PAGE", page)
    return page


@pytest.fixture
def rows(monkeypatch):
    """Knows one row from before, and compiles any but rn50."""

    def row(model, topology, known_only):
        if model == "rn50" and not known_only:
            raise PlanError("no libtpu")
        return f"| {model} | {topology} |" if not known_only or (model, topology) == ("rn50", "v5p:4x4x4") else None

    monkeypatch.setattr(pod_plan, "row", row)


def test_rows_that_are_not_compiled_are_left_out_and_named(page, rows, capsys):
    assert pod_plan.main(["--models=vit_l14,rn50", "--topologies=v5litepod-256,v6e:16x16"]) == 0
    lines = page.read_text().splitlines()
    table = lines[lines.index(pod_plan.BEGIN) + 3 : lines.index(pod_plan.END)]
    assert table == ["| vit_l14 | v5e:16x16 |", "| rn50 | v5p:4x4x4 |", "| vit_l14 | v6e:16x16 |"]
    assert lines[0] == "before" and lines[-1] == "after"
    error = capsys.readouterr().err
    assert "rn50 on v5e:16x16: no libtpu" in error
    left_out = error.splitlines()[-1]
    assert "left out" in left_out and "rn50 on v6e:16x16" in left_out and "vit_l14 on v5e:16x16" not in left_out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models=vit_l15"], "did you mean vit_l14"),
        (["--topologies=v5litepod-12"], "--topologies=v5litepod-12: Google has no v5litepod slice of 12 chips"),
        (["--topologies=v5e:16x16,v4-8"], "--topologies=v4:2x2x1 is not in the table of v5e:16x16"),
    ],
)
def test_a_mistake_is_told_in_a_line_and_the_page_stays(page, rows, capsys, arguments, message):
    before = page.read_text()
    assert pod_plan.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert page.read_text() == before
