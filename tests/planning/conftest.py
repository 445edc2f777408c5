import pytest

from clip_jax.config import default_config


@pytest.fixture
def config():
    config = default_config("ViT-B/32")
    config.data.source = "none"
    return config
