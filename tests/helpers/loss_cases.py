"""Losses on small batches, and what each must come to: its plain formula in float64."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clip_jax.losses import default_section, make_loss
from clip_jax.losses.base import Loss
from clip_jax.losses.sigmoid import sigmoid_loss
from clip_jax.losses.softmax import softmax_loss
from clip_jax.sharding import batch_sharding

COUNT, BLOCK_SIZE = 40, 3  # 40, 20, 10 or 5 pairs a device, none a multiple of the block
# Every way in which a loss is computed: the changes to config.loss.
CASES = {
    "gather": {"kind": "softmax", "form": "gather"},
    "blockwise": {"kind": "softmax", "form": "blockwise"},
    "sigmoid": {"kind": "sigmoid"},
}
FORMULAS = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


def make(case: str, mesh: Mesh, block_size: int = BLOCK_SIZE, count: int = COUNT) -> Loss:
    section = default_section()
    section.update(CASES[case], block_size=block_size)
    return make_loss(section, mesh, count, "float32")


def compiled(loss: Loss):
    """A function to ``(loss, metrics)`` and the gradients by images, texts and parameters."""
    return jax.jit(jax.value_and_grad(loss.__call__, argnums=(0, 1, 2), has_aux=True))


def parameters_of(case: str, logit_scale: float, logit_bias: float = -2.0) -> dict[str, float]:
    return {"logit_scale": logit_scale} | ({"logit_bias": logit_bias} if case == "sigmoid" else {})


def embeddings(count: int, width: int, alike: float = 0.7, seed: int = 0) -> list[np.ndarray]:
    """Images and texts, float64 unit vectors; each text resembles its image."""
    random = np.random.default_rng(seed)
    images = random.normal(size=(count, width))
    texts = alike * images + random.normal(size=(count, width))
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts)]


def on_devices(mesh: Mesh, images, texts, parameters: dict[str, float]) -> tuple:
    rows = [jax.device_put(jnp.float32(x), batch_sharding(mesh)) for x in (images, texts)]
    return *rows, jax.tree.map(jnp.float32, parameters)


def reference(case: str, images, texts, parameters: dict[str, float]):
    """The loss and its gradients by images, texts and parameters, by the plain formula in float64."""
    formula = FORMULAS[CASES[case]["kind"]]
    with jax.enable_x64(True):
        inputs = jax.tree.map(jnp.float64, (images, texts, parameters))
        loss, gradients = jax.value_and_grad(lambda *x: formula(*x[:2], **x[2]), argnums=(0, 1, 2))(*inputs)
        return jax.tree.map(np.asarray, (loss, gradients))


def logits_of(images, texts, parameters: dict[str, float]) -> np.ndarray:
    return math.exp(parameters["logit_scale"]) * images @ texts.T + parameters.get("logit_bias", 0.0)


def reference_accuracies(logits: np.ndarray) -> tuple[float, float]:
    return tuple((logits.argmax(axis) == np.arange(len(logits))).mean() for axis in (1, 0))


def reference_pair_losses(case: str, logits: np.ndarray) -> np.ndarray:
    """What each pair adds to the loss, times the number of pairs."""
    if case == "sigmoid":
        return np.logaddexp(0, -(2 * np.eye(len(logits)) - 1) * logits).sum(axis=1)
    log_sums = [np.logaddexp.reduce(logits, axis) for axis in (1, 0)]
    return sum(log_sums) / 2 - np.diag(logits)


def assert_gradients(gradients, expected) -> None:
    def check(gradient, of_reference):
        np.testing.assert_allclose(gradient, of_reference, rtol=1e-3, atol=2e-5 * np.abs(of_reference).max())

    jax.tree.map(check, tuple(gradients), tuple(expected))


def array_shapes(program: str) -> set[tuple[int, ...]]:
    """All shapes of arrays in a compiled program."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d*\[(\d+(?:,\d+)*)\]", program)}
