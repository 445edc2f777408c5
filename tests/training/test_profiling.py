"""``--profile`` traces exactly the steps that it names."""

import gzip
import json
import pathlib

import pytest
from trial import SMALL

from clip_jax.main import main
from clip_jax.training.profiling import parse_profile

pytestmark = pytest.mark.usefixtures("one_device")


def traced_steps(workdir: pathlib.Path) -> list[int]:
    """The numbers of the steps in the only trace of a run."""
    [trace] = (workdir / "profile").rglob("*.trace.json.gz")
    assert list(trace.parent.glob("*.xplane.pb"))  # what XProf and TensorBoard read
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train" and "args" in event]
    return sorted(map(int, steps))


def test_the_named_steps_are_traced_and_a_resumed_run_past_them_says_so(tmp_path, capsys):
    arguments = [*SMALL, f"--workdir={tmp_path}", "--profile=2:4", "--config.steps=5"]
    assert main(arguments) == 0
    assert traced_steps(tmp_path) == [3, 4]
    assert f"wrote a trace of the steps after 2 to {tmp_path}/profile" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "--profile=2:4: nothing is traced, since the run is at step 5 already" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["5", "5:5", "6:5", "a:b", "-1:5", "1:2:3", ":"])
def test_a_profile_that_is_no_range_is_one_line(text, tmp_path, capsys):
    assert main([*SMALL, f"--workdir={tmp_path}/run", f"--profile={text}"]) == 2
    assert (
        capsys.readouterr().err
        == f"error: --profile={text}: must be START:STOP, two steps, the first below the second\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_profile_beyond_the_last_step_is_one_line(tmp_path, capsys):
    assert main([*SMALL, f"--workdir={tmp_path}/run", "--config.steps=5", "--profile=4:6"]) == 2
    assert capsys.readouterr().err == "error: --profile=4:6: the run has only 5 steps\n"


def test_no_profile_is_none():
    assert parse_profile("") is None
