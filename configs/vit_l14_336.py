"""Trains ViT-L/14@336: the trained ViT-L/14, one more epoch at 336 pixels and a low learning rate (section 2.5).

python -m clip_jax.main --config=configs/vit_l14_336.py --config.init_from=/mnt/shared/vit_l14 \\
    --workdir=/mnt/shared/vit_l14_336 --config.data.source=...

Not run in full yet. The paper's model reaches 76.2 % zero-shot on ImageNet (table 11).
"""

from clip_jax.config import default_config


def get_config():
    config = default_config("ViT-L/14@336")
    config.init_from = "runs/vit_l14"  # the default --workdir of configs/vit_l14.py
    config.epochs = 1.0
    config.optimizer.learning_rate = 2e-5
    config.model.remat = "full"
    return config
