import pytest
from goldens import unpack


@pytest.fixture(scope="session")
def goldens(tmp_path_factory):
    """Every golden model by its name in goldens.MODELS; what is unpacked must not be changed."""
    return unpack(tmp_path_factory.mktemp("goldens"))
