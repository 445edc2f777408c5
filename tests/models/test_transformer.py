"""QuickGELU against its formula."""

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.models.transformer import quick_gelu


def test_quick_gelu_is_x_times_the_sigmoid_of_1_702_x():
    x = np.linspace(-8, 8, 101)
    np.testing.assert_allclose(quick_gelu(jnp.float32(x)), x / (1 + np.exp(-1.702 * x)), rtol=2e-5, atol=1e-7)
    assert abs(quick_gelu(jnp.float32(1.0)) - jax.nn.gelu(jnp.float32(1.0))) > 1e-3  # not the exact one
