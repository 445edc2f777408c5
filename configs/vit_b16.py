"""Trains ViT-B/16 as in the CLIP paper: batch 32,768, 32 epochs.

python -m clip_jax.main --config=configs/vit_b16.py --workdir=/mnt/shared/vit_b16 --config.data.source=...

Not run in full yet. The paper's model reaches 68.6 % zero-shot on ImageNet (table 11).
"""

from clip_jax.config import default_config


def get_config():
    return default_config("ViT-B/16")
