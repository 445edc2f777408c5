"""Trains RN50x64 as in the CLIP paper: batch 32,768, 32 epochs.

python -m clip_jax.main --config=configs/rn50x64.py --workdir=/mnt/shared/rn50x64 --config.data.source=...

Not run in full yet. The paper's model reaches 73.6 % zero-shot on ImageNet (table 11).
"""

from clip_jax.config import default_config


def get_config():
    config = default_config("RN50x64")
    config.optimizer.learning_rate = 3.6e-4
    config.model.remat = "full"
    return config
