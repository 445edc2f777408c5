"""Makes random batches of images and tokens for the benchmarks, without JAX or PyTorch."""

import numpy as np

from clip_jax.models.presets import CLIPPreset


def random_batch(preset: CLIPPreset, batch_size: int) -> dict[str, np.ndarray]:
    """Returns ``image`` uint8 ``[B, H, W, 3]`` and ``tokens`` int32 ``[B, L]``, each ending with end-of-text."""
    rng = np.random.default_rng(0)
    size, length = preset.vision.image_size, preset.text.context_length
    tokens = rng.integers(1, preset.text.vocab_size - 2, (batch_size, length), np.int32)
    tokens[:, -1] = preset.text.vocab_size - 1  # end of text
    return {"image": rng.integers(0, 256, (batch_size, size, size, 3), np.uint8), "tokens": tokens}
