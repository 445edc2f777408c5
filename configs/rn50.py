"""Trains RN50 as in the CLIP paper: batch 32,768, 32 epochs.

python -m clip_jax.main --config=configs/rn50.py --workdir=/mnt/shared/rn50 --config.data.source=...

Not run in full yet. The paper's model reaches 59.6 % zero-shot on ImageNet (table 11).
"""

from clip_jax.config import default_config


def get_config():
    return default_config("RN50")
