"""The optimizer: AdamW with warm-up, cosine schedule and weight decay (section 2.5 and table 18 of the CLIP paper)."""

import dataclasses

import jax
import ml_collections
import numpy as np
import optax

from clip_jax.settings import DTYPES, must_be, must_be_one_of, must_be_positive, must_not_be_negative

# Names of parameters without weight decay: gains and biases, as in the paper, and embeddings that are added to tokens.
WITHOUT_DECAY = ("bias", "scale", "class_embedding", "positional_embedding")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Defaults of ``config.optimizer``: those of the paper's Vision Transformers (table 18)."""

    learning_rate: float = 5e-4
    warmup_steps: int = 2_000
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-6
    weight_decay: float = 0.2
    first_moment_dtype: str = "float32"  # or "bfloat16"; of Adam's mean of the gradients
    gradient_clip_norm: float = 0.0  # global norm; 0: no clipping

    def problems(self) -> list[str]:
        """Returns one line for each invalid value."""
        prefix = "config.optimizer"
        problems = [
            *must_be_positive(self, ("learning_rate", "epsilon"), prefix),
            *must_not_be_negative(self, ("warmup_steps", "weight_decay", "gradient_clip_norm"), prefix),
            *must_be_one_of(self, "first_moment_dtype", DTYPES, prefix),
        ]
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            problems += must_be(0 <= value < 1, f"{prefix}.{name}={value} must be in [0, 1)")
        return problems


def decay_mask(params) -> dict:
    """Returns True where weight decay applies: by name, as biases of scanned layers have rank 2; never to scalars."""

    def decays(path, leaf) -> bool:
        # Only dictionary keys: the path may end with the box that has a parameter's logical axes.
        names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        return leaf.ndim > 0 and names[-1] not in WITHOUT_DECAY

    return jax.tree.map_with_path(decays, params)


def learning_rate_schedule(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Returns a linear warm-up from 0 over ``warmup_steps``, then half a cosine to 0 at ``steps``."""
    warmup = min(config.warmup_steps, steps // 2)  # so that a short trial of a long training reaches the full rate
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, steps)


def learning_rates(config: ml_collections.ConfigDict, steps: int) -> np.ndarray:
    """Returns the learning rate of each step, float32 ``[steps]``, to log without work for a device in training."""
    return np.asarray(learning_rate_schedule(config, steps)(np.arange(steps)), np.float32)


def store_first_moment(adam: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """Returns ``adam`` with its mean of the gradients stored in ``dtype`` and updated in float32.

    ``optax.adamw(mu_dtype="bfloat16")`` also rounds beta1, so that 0.9 becomes 0.8984.
    """

    def cast(state: optax.OptState, dtype: str) -> optax.OptState:
        return optax.tree.set(state, mu=jax.tree.map(lambda mean: mean.astype(dtype), optax.tree.get(state, "mu")))

    def update(updates, state, params=None):
        updates, state = adam.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(adam.init(params), dtype), update)


def clip_gradient(optimizer: optax.GradientTransformation, norm: float) -> optax.GradientTransformation:
    """Returns ``optimizer`` with the gradient's global norm clipped.

    Its state is that of ``optimizer``, unlike with ``optax.chain``, so that a run may turn clipping on and off.
    """
    clip = optax.clip_by_global_norm(norm)

    def update(updates, state, params=None):
        updates, _ = clip.update(updates, optax.EmptyState(), params)
        return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def make_optimizer(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of ``config.optimizer``, for parameters without boxes."""
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.first_moment_dtype != "float32":
        adamw = store_first_moment(adamw, config.first_moment_dtype)
    return clip_gradient(adamw, config.gradient_clip_norm) if config.gradient_clip_norm else adamw
