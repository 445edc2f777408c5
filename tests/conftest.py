"""Eight virtual CPU devices and an empty cache for the tests; what tests of towers and steps share."""

import math
import os
import shutil
import tempfile

from trial import GIVEN_CACHE, QUICK_COMPILATION

# Read when JAX starts, so they have to stand here before its first import.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["XLA_FLAGS"] += f" {QUICK_COMPILATION}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="clip_jax_tests_")
# Most of the time of most tests is compilation, of programs that other tests, workers of xdist and processes that tests
# start compile as well. One folder for all of them, which the first process makes and removes.
os.environ["JAX_COMPILATION_CACHE_DIR"] = GIVEN_CACHE or tempfile.mkdtemp(prefix="clip_jax_compiled_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Programs as small as these take far longer to optimize than to run. The nightly tests optimize, as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_training
from jax.sharding import AxisType, Mesh
from warm_python_server import collect_garbage_rarely

all_devices = jax.devices  # also where ``one_device`` has replaced it

# Eight devices hold eight copies of most arrays, and orbax lets each of them save a slice. Thousands of slices of a few
# bytes take a second for each checkpoint; the limit turns this off for small arrays.
ocp.type_handlers.get_type_handler(jax.Array)._min_slice_bytes_for_replica_parallel = 2**20

# The files that take longest. Each process of xdist takes one file at a time, in this order; a long file that came
# last would run alone.
LONGEST_FIRST = (
    "tests/peers/test_architectures.py",
    "tests/peers/test_files.py",
    "tests/test_documents.py",
    "tests/pod/test_equality.py",
    "tests/pod/test_lost_host.py",
    "tests/training/test_bad_data.py",
    "tests/pod/test_evaluation.py",
    "tests/training/test_step.py",
    "tests/pod/test_resuming.py",
    "tests/test_convert.py",
    "tests/pod/test_local_pod.py",
    "tests/training/test_step_resnet.py",
    "tests/benchmarks/test_accelerator.py",
)


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    rank = {file: place for place, file in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


def pytest_collection_finish():
    collect_garbage_rarely()


def pytest_unconfigure():
    if not GIVEN_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _cache_that_ends_with_the_tests():
    yield
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def mesh_of():
    """A function from a shape ``(data, fsdp)`` to a mesh of the first ``data * fsdp`` devices."""

    def make(shape: tuple[int, int]) -> Mesh:
        devices = np.array(all_devices()[: math.prod(shape)]).reshape(shape)
        return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    return make


@pytest.fixture(scope="module")
def one_device():
    """For tests of whole commands, which trace and compile for eight devices twice as long as for one."""
    first = all_devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("devices", "local_devices"):
            patch.setattr(jax, name, lambda *_: first)
        for name in ("device_count", "local_device_count"):
            patch.setattr(jax, name, lambda *_: 1)
        yield


@pytest.fixture(scope="module")
def tiny_config():
    return tiny_training.tiny_config()


@pytest.fixture
def full_compilation():
    """For tests that read the program: without optimization it has copies that the simplifications would remove."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
