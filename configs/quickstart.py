"""A small CLIP from scratch on the pairs that ship, in minutes on two CPU cores.

python -m clip_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from clip_jax.config import default_config


def get_config():
    config = default_config("ViT-tiny")
    config.global_batch_size = 256
    config.steps = 900
    config.eval_every = 300
    config.checkpoint_every = 200
    config.model.dtype = "float32"
    config.model.scan_unroll = 6
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.data.source = "emoji:noto,twemoji/train"
    config.data.num_workers = 1
    config.evaluation.zero_shot = "emoji:openmoji/all"
    config.evaluation.pixel_baseline = "emoji:noto,twemoji/all"
    with config.evaluation.unlocked():
        config.evaluation.retrieval.unseen_concepts = "emoji:noto,twemoji/held_out"
        config.evaluation.retrieval.unseen_concepts_in_the_unseen_style = "emoji:openmoji/held_out"
    return config
