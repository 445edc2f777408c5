"""Trains a ViT-S/16 of 62 million parameters on clip art and the included emoji: 5,000 steps on one GPU.

apt-get install openclipart-png openclipart-svg
for part in train held_out; do
    python -m clip_jax.prepare openclipart /usr/share/openclipart/png /usr/share/openclipart/svg \
        data/$part/openclipart --part=$part --image-size=192
done
python -m clip_jax.main --config=configs/clipart_vit_s16.py --workdir=runs/clipart

Results and time are not measured yet (docs/performance.md). Five million pairs take ten minutes at 8,500 a second.
"""

from clip_jax.config import default_config


def get_config():
    config = default_config("ViT-S/16")
    config.global_batch_size = 1_024
    config.steps = 5_000
    config.log_every = 50
    config.eval_every = 1_000
    config.checkpoint_every = 1_000
    config.model.vision.image_size = 160
    config.model.text.context_length = 32  # 95 % of the clip art's captions have at most 15 tokens
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 500
    config.optimizer.gradient_clip_norm = 1.0
    # Eight thousand pairs, each used six hundred times. Rotation and warping are left out: they cost the most CPU time.
    augmentation = config.data.augmentation
    augmentation.crop_scale = 0.5
    augmentation.flip = 0.5
    augmentation.saturation = 0.4
    augmentation.brightness = 0.2
    augmentation.grayscale = 0.1
    augmentation.erasing = 0.3
    config.data.source = "emoji:noto,twemoji/train + array_record:data/train/openclipart/pairs-*"
    config.data.num_workers = 12
    # Clip art and emoji whose names are not in the training data of the same collection (a few are in the other
    # collection's), and a style of emoji that is not in the training data.
    config.evaluation.tasks = "open_clipart,emoji_unseen_both,emoji_unseen_style"
    config.evaluation.data = "data/held_out"
    return config
