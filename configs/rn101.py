"""Trains RN101 as in the CLIP paper: batch 32,768, 32 epochs.

python -m clip_jax.main --config=configs/rn101.py --workdir=/mnt/shared/rn101 --config.data.source=...

Not run in full yet. The paper's model reaches 62.2 % zero-shot on ImageNet (table 11).
"""

from clip_jax.config import default_config


def get_config():
    return default_config("RN101")
