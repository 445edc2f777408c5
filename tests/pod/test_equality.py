"""However devices, processes and memory are arranged, 20 steps come to the losses and parameters of one device."""

import functools
import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from trees import assert_trees_close
from trial import REPOSITORY, environment, pod_variables
from variants import Variant, train

MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
LAYOUTS = [(1, 8), (2, 4), (4, 2)]  # processes, and the devices of each
SECONDS = 240  # for a variant, of which it takes a third where nothing else runs
ALL = [
    Variant(*values)
    for values in itertools.product(MESHES, ("gather", "blockwise"), (1, 2), ("none", "lite", "attention", "full"))
]
# Every value of every setting, and with what is drawn at random.
ON_EIGHT_DEVICES = [Variant((2, 4), "blockwise", 1, "full", "sigmoid")]
OF_TWO_PROCESSES = [Variant((2, 2), "gather", 2, "lite", "dropout")]
FEW = [
    Variant((8, 1), "gather", 1, "none"),
    Variant((8, 1), "blockwise", 2, "lite"),
    Variant((4, 2), "gather", 2, "attention"),
    Variant((2, 4), "gather", 2, "full", "dropout"),
    Variant((1, 8), "gather", 1, "lite", "dropout"),
    Variant((1, 8), "blockwise", 2, "attention", "sigmoid"),
    Variant((4, 2), "blockwise", 1, "full"),
    Variant((2, 4), "blockwise", 1, "none", "sigmoid"),
    Variant((1, 4), "blockwise", 2, "attention", "sigmoid"),
    *ON_EIGHT_DEVICES,
]


def train_in_processes(processes: int, devices: int, variants: list[Variant], folder) -> dict[Variant, tuple]:
    """What each variant came to, by a pod of this many processes, which is ended with the deadline at the latest."""
    path = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests/helpers")])}
    # New interpreters, since each host has a hash seed of its own.
    command = [sys.executable, "tests/helpers/variants.py", str(folder), *(variant.name for variant in variants)]
    pod = []
    try:
        for index, place in enumerate(pod_variables(processes) if processes > 1 else [{}]):
            variables = environment(devices) | path | place
            with open(folder / f"{index}.log", "w") as log:
                pod.append(subprocess.Popen(command, cwd=REPOSITORY, env=variables, stdout=log, stderr=log))
        for index, process in enumerate(pod):
            assert process.wait(timeout=SECONDS * len(variants)) == 0, (folder / f"{index}.log").read_text()
    finally:
        for process in pod:
            process.kill()
            process.wait()
    return {variant: pickle.loads((folder / f"{variant.name}.pickle").read_bytes()) for variant in variants}


@pytest.fixture(scope="module")
def on_one_device():
    """What a function comes to on one device; each is trained once."""
    return functools.cache(lambda function: train(Variant((1, 1), "gather", 1, "none", function)))


def assert_the_same(results: dict[Variant, tuple], on_one_device) -> None:
    for variant, (losses, params) in results.items():
        expected_losses, expected_params = on_one_device(variant.function)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, err_msg=variant.name)
        # Adam makes a little of what rounding leaves of the gradient by a key's bias, which is 0.
        assert_trees_close(params, expected_params, rtol=1e-3)


@pytest.mark.parametrize("variant", ON_EIGHT_DEVICES, ids=lambda variant: variant.name)
def test_eight_devices_come_to_what_one_device_comes_to(on_one_device, variant):
    assert_the_same({variant: train(variant)}, on_one_device)


@pytest.mark.parametrize(
    ("processes", "devices", "variants"),
    [
        pytest.param(2, 2, OF_TWO_PROCESSES, id="2x2-few"),
        *(
            pytest.param(*layout, ALL + FEW, id="{}x{}-all".format(*layout), marks=pytest.mark.slow)
            for layout in LAYOUTS
        ),
    ],
)
def test_every_arrangement_comes_to_what_one_device_comes_to(on_one_device, processes, devices, variants, tmp_path):
    assert_the_same(train_in_processes(processes, devices, variants, tmp_path), on_one_device)


def test_what_is_trained_does_make_a_difference(on_one_device):
    sigmoid, dropout = (on_one_device(name)[0] for name in ("sigmoid", "dropout"))
    assert sigmoid[-1] < sigmoid[0]
    assert dropout[-1] < dropout[0]
    assert np.abs(sigmoid - dropout).min() > 0.1
