"""In which precision the losses multiply on each kind of device."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.losses.products import products_on

TPU = SimpleNamespace(platform="tpu")
H200, V100 = (SimpleNamespace(platform="gpu", compute_capability=capability) for capability in ("9.0", "7.0"))


@pytest.mark.parametrize(
    ("device", "platform", "dtype", "embeddings", "gradients"),
    [
        (TPU, "tpu", "bfloat16", "HIGHEST", "HIGHEST"),
        (V100, "cuda", "bfloat16", "HIGHEST", "HIGHEST"),
        (H200, "cuda", "bfloat16", "lhs_precision_type = tf32", "lhs_precision_type = bf16"),
        (H200, "cuda", "float32", "lhs_precision_type = tf32", "lhs_precision_type = tf32"),
    ],
    ids=["TPU", "V100", "H200", "H200 in float32"],
)
def test_products_are_of_float32_except_on_a_recent_gpu(device, platform, dtype, embeddings, gradients):
    products = products_on(SimpleNamespace(devices=np.array([device])), dtype)
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    for product, precision in ((products.embeddings, embeddings), (products.logit_gradients, gradients)):
        program = jax.jit(product).trace(x, x).lower(lowering_platforms=(platform,)).as_text()
        assert precision in program
