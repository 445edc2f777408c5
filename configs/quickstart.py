"""Trains a small CLIP from scratch on the included emoji images and captions, in minutes on two CPU cores.

python -m clip_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

It takes 894 s. On OpenMoji, a style that is not trained on, it has 25 % top-1 and 45 % top-5 accuracy among
1,906 names; the nearest mean image has 12 % and 25 % (docs/quickstart.md).
"""

from clip_jax.config import default_config


def get_config():
    config = default_config("ViT-tiny")
    config.global_batch_size = 128
    config.steps = 12_000
    config.log_every = 200
    config.eval_every = 4_000
    config.checkpoint_every = 2_000
    config.model.dtype = "float32"
    config.model.scan_unroll = 2
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 500
    config.optimizer.gradient_clip_norm = 1.0
    augmentation = config.data.augmentation
    augmentation.rotation = 15.0
    augmentation.zoom = 0.3
    augmentation.stretch = 0.2
    augmentation.shear = 0.1
    augmentation.translation = 0.1
    augmentation.warp = 0.05
    augmentation.hue = 20.0
    augmentation.saturation = 0.4
    augmentation.brightness = 0.2
    augmentation.grayscale = 0.1
    augmentation.outline = 0.25
    config.data.source = "emoji:noto,twemoji,fluent_flat,fluent_color,emojione,fxemoji,noto_v1/train"
    config.data.cache_mebibytes = 128  # enough for all images, in each worker
    config.data.num_workers = 2
    config.evaluation.tasks = (
        "emoji_unseen_style,emoji_unseen_style_trained,emoji_unseen_concepts,emoji_unseen_both,emoji_groups"
    )
    return config
