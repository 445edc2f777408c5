"""Chooses how the towers and the loss are computed on each kind of device. The result is an :class:`Execution`.

============================ ======= ======= ======== =================================================================
choice                       CPU     TPU     GPU      why
============================ ======= ======= ======== =================================================================
class_token_apart            no      yes     no       a TPU pads 257 positions to 384: docs/design.md, docs/pods.md
fused_attention              no      no      yes      a step of ViT-L/14 in at least 225 ms, without it 276
all layers in one scan step  no      no      yes      at least 215 ms, in 58 GiB instead of 94 if nothing is recomputed
row_major                    no      no      yes      at least 190 ms
separate products            no      no      yes      for queries, keys and values: at least 184 ms
merge_leading_axes           yes     no      no       on a CPU, gradients that contract two axes are slow
sums_by_product              no      yes     yes      one pass over the exponentials instead of two
loss_block_size              1,024   1,024   8,192    32,768 pairs in at least 16.4 ms; by 4,096 20.2, by 1,024 27.6
similarity_precision         float32 float32 TF32     a GPU's matrix units have no float32: docs/design.md
embedding_gradient_precision float32 float32 bfloat16 32,768 pairs in at least 16.4 ms, by TF32 20.0
============================ ======= ======= ======== =================================================================

The other choices for GPUs come from the compiler's program for one H200, for a step of 256 pairs with remat lite
(``python -m benchmarks.gpu_program --forms``, docs/performance.md). The times are lower bounds computed from its
kernels; nothing has been timed yet. On a TPU, by the compiler's estimate, loss blocks of 512 take a fifth longer than
1,024, and blocks of 2,048 take as long. The separate products are in ``attention.into_heads_by_position``.
"""

import dataclasses
import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from clip_jax.sharding import batch_sharding

Precision = jax.lax.Precision | jax.lax.DotAlgorithmPreset
REMAT_POLICIES = ("none", "lite", "attention", "full")
FUSED_HEAD_WIDTHS = range(8, 129, 8)  # of cuDNN's attention, on every GPU that supports it
FUSED_COMPUTE_CAPABILITY = 8.0  # Ampere
ALL_LAYERS = 1_000  # in one step of the scan: more than any tower has


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is computed. It changes results only by rounding. The defaults work on any device.

    Attributes:
      dtype: of activations and products. Parameters are float32.
      remat: how much of a layer the backward pass computes again, for all scanned layers but the last: "none"; "lite",
        only cheap operations; "attention", all but the results of attention; or "full". A ResNet has "none" and "full".
      scan_layers: if False, each layer of a transformer has its own parameters (``transformer.unstack_layers``). A scan
        copies a layer's parameters out of the stack at each step, which is slower for inference.
      scan_unroll: layers in one step of the scan over layers. 1 compiles fastest; all layers in one step let XLA
        optimize across layers, which is faster for small models on CPU.
      fused_attention: attention by cuDNN, for GPUs, in bfloat16.
      class_token_apart: a Vision Transformer's class token is a separate segment from its patches, for TPUs.
      merge_leading_axes: all axes of the activations but the last are merged before a product with parameters, for
        CPUs: XLA is slow there at a gradient that contracts two axes (``benchmarks/cpu_gradients.py``). On a TPU,
        merging copies if the length is not a multiple of 8.
      sums_by_product: the product of a softmax's exponentials with the values also computes the softmax's denominators,
        by a feature of ones that is appended to the values. Without effect in fused attention.
      row_major: ``layers.shard_batch`` also fixes the memory layout of activations, for GPUs.
      batch_sharding: how the first axis of every activation is split over devices; None lets the compiler choose.
      loss_block_size: the blockwise loss computes ``[loss_block_size, loss_block_size]`` logits at a time.
      similarity_precision: of the loss's products of float32 embeddings.
      embedding_gradient_precision: of the loss's products of logits' gradients with embeddings, if the towers use the
        result in bfloat16.
    """

    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    scan_layers: bool = True
    scan_unroll: int = 1
    fused_attention: bool = False
    class_token_apart: bool = False
    merge_leading_axes: bool = True
    sums_by_product: bool = False
    row_major: bool = False
    batch_sharding: jax.sharding.NamedSharding | None = None
    loss_block_size: int = 1_024
    similarity_precision: Precision = jax.lax.Precision.HIGHEST
    embedding_gradient_precision: Precision = jax.lax.Precision.HIGHEST


_CPU = Execution()
_TPU = Execution(class_token_apart=True, merge_leading_axes=False, sums_by_product=True)
_GPU = Execution(
    fused_attention=True,
    scan_unroll=ALL_LAYERS,
    merge_leading_axes=False,
    sums_by_product=True,
    row_major=True,
    loss_block_size=8_192,
    similarity_precision=jax.lax.DotAlgorithmPreset.TF32_TF32_F32,
    embedding_gradient_precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
)
# GPUs older than Ampere or not by NVIDIA have no TF32, and no attention by cuDNN.
_OTHER_GPU = Execution(
    scan_unroll=ALL_LAYERS, merge_leading_axes=False, sums_by_product=True, row_major=True, loss_block_size=8_192
)


def execution_on(device: jax.Device) -> Execution:
    """Returns the table's choices for a device of this machine or of a topology to compile for."""
    if device.platform == "gpu":
        capability = str(getattr(device, "compute_capability", ""))  # "9.0" of an H200, "gfx942" of an MI300X
        is_recent = re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= FUSED_COMPUTE_CAPABILITY
        return _GPU if is_recent else _OTHER_GPU
    return _TPU if device.platform == "tpu" else _CPU


def choose_execution(
    mesh: jax.sharding.Mesh,
    head_widths: Iterable[float],
    dtype: str,
    remat: str = "none",
    scan_unroll: int = 0,
    fused_attention: bool = True,
) -> Execution:
    """Returns how a model is computed on a mesh: the device's choices, limited by the config and the model.

    Args:
      mesh: the devices, of one kind; activations are split over them.
      head_widths: of the attention layers that may be fused. cuDNN supports only :data:`FUSED_HEAD_WIDTHS`.
      dtype: "float32" or "bfloat16". cuDNN's attention has no float32.
      remat: one of :data:`REMAT_POLICIES`.
      scan_unroll: layers in one step of the scan. 0: one, but on a GPU all of them with remat "none" or "lite".
      fused_attention: whether it is allowed.
    """
    choices = execution_on(mesh.devices.flat[0])
    can_fuse = jnp.dtype(dtype) == jnp.bfloat16 and all(width in FUSED_HEAD_WIDTHS for width in head_widths)
    return dataclasses.replace(
        choices,
        dtype=jnp.dtype(dtype),
        remat=remat,
        scan_unroll=scan_unroll or (choices.scan_unroll if remat in ("none", "lite") else 1),
        fused_attention=choices.fused_attention and fused_attention and can_fuse,
        batch_sharding=batch_sharding(mesh),
    )
