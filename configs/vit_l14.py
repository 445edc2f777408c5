"""Trains ViT-L/14 as in the CLIP paper: batch 32,768, 32 epochs. Run this on every host of a pod:

python -m clip_jax.main --config=configs/vit_l14.py --workdir=/mnt/shared/vit_l14 --config.data.source=...

Not run in full yet. The paper's model reaches 75.3 % zero-shot on ImageNet (table 11).
"""

from clip_jax.config import default_config


def get_config():
    config = default_config("ViT-L/14")
    config.optimizer.learning_rate = 4e-4
    config.model.remat = "attention"
    return config
