"""A checkpoint of a pod is verified by pods of other sizes, whichever host holds what is damaged."""

import os
import shutil
import subprocess
import sys

import pytest
from trial import REPOSITORY, environment, pod_variables

# Processes, the devices of each, and the mesh.
LAYOUTS = {
    "one": (1, 1, (1, 1)),
    "halves": (2, 1, (1, 2)),
    "quarters": (4, 1, (1, 4)),
    "mixed": (2, 2, (2, 2)),
    "replicas": (2, 2, (4, 1)),
}


def run(action: str, folder, layout: str) -> list[str]:
    """Returns what each host has printed, but for what the libraries print."""
    processes, devices, mesh = LAYOUTS[layout]
    command = [sys.executable, "tests/helpers/pod_checkpoint.py", action, str(folder), *map(str, mesh)]
    pod = [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment(devices) | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for variables in (pod_variables(processes) if processes > 1 else [{}])
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in pod]
    finally:
        for process in pod:
            process.kill()
            process.wait()
    assert [process.returncode for process in pod] == [0] * processes, outputs
    return ["\n".join(line for line in output.splitlines() if "[Gloo]" not in line) for output in outputs]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("one", "halves"),  # no host holds a whole piece
        *(
            pytest.param(before, after, marks=pytest.mark.slow)
            for before, after in [
                ("one", "quarters"),
                ("mixed", "quarters"),
                ("quarters", "one"),
                ("replicas", "mixed"),
                ("mixed", "replicas"),
            ]
        ),
    ],
)
def test_damage_is_noticed_by_any_pod_and_all_hosts_take_the_checkpoint_before(tmp_path, before, after):
    run("save", tmp_path / "run", before)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert run("restore", tmp_path / "run", after) == ["restored 2"] * LAYOUTS[after][0]
    files = (tmp_path / "copy/checkpoints/2/state").rglob("ocdbt.process_*/d/*")
    largest = max(files, key=os.path.getsize)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    outputs = run("restore", tmp_path / "copy", after)
    assert all(output.endswith("restored 1") for output in outputs), outputs
    assert any("checkpoint 2 is damaged and is skipped: " in output for output in outputs)
