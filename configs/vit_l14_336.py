"""ViT-L/14@336: ViT-L/14 at 336 pixels, one epoch at a low rate (section 2.5 of the paper).

The paper starts it from the trained ViT-L/14. This config starts it from scratch: starting from another model's
weights is not built yet.

    python -m clip_jax.main --config=configs/vit_l14_336.py --workdir=/mnt/shared/vit_l14_336 --config.data.source=...

Not run in full yet. The paper's model reaches 76.2 % zero-shot on ImageNet (table 11).
"""

from clip_jax.config import default_config


def get_config():
    config = default_config("ViT-L/14@336")
    config.epochs = 1.0
    config.optimizer.learning_rate = 2e-5
    config.model.remat = "full"
    return config
