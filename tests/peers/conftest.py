import contextlib

import jax
import pytest

with contextlib.suppress(ImportError):  # without the peers installed, each test module skips itself
    import benchmarks.peers  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def _optimized_programs():
    """The models compared with the peers are large: their programs take longer to run than to optimize."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
