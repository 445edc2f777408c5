"""AdamW as the paper trains (section 2.5, table 18): warm-up, cosine, and weight decay by name."""

import jax
import ml_collections
import optax

# Gains and biases, as in the paper, and what is added to tokens and not multiplied with them.
WITHOUT_DECAY = ("bias", "scale", "class_embedding", "positional_embedding")


def decay_mask(params) -> dict:
    """True where weight decay applies: by name, since scanned layers make biases matrices; to scalars it never does."""

    def decays(path, leaf) -> bool:
        # The last dictionary key: the box that carries a parameter's logical axes may follow it.
        names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        return leaf.ndim > 0 and names[-1] not in WITHOUT_DECAY

    return jax.tree.map_with_path(decays, params)


def learning_rate_schedule(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Linear from 0 over ``warmup_steps``, then half a cosine to 0 at ``steps``."""
    warmup = min(config.warmup_steps, steps // 2)  # a short trial of a long training still reaches its rate
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, steps)


def make_optimizer(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    """``config.optimizer`` as an optax transformation over the bare parameter tree."""
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mu_dtype=config.first_moment_dtype,
        mask=decay_mask,
    )
    if config.gradient_clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.gradient_clip_norm), adamw)
    return adamw
