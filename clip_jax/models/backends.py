"""Which form of the same functions suits which kind of device, and the figures behind the choice.

============================ ======= ======= ======== =================================================================
choice                       CPU     TPU     GPU      why
============================ ======= ======= ======== =================================================================
class_token_apart            no      yes     no       a TPU pads 257 positions to 384: docs/design.md, docs/pods.md
fused_attention              no      no      yes      a step of ViT-L/14 in at least 225 ms, without it 276
unrolled_scan                no      no      yes      at least 215 ms, in 58 GiB instead of 94 if nothing is recomputed
row_major                    no      no      yes      at least 190 ms
a product for each           no      no      yes      of queries, keys and values: at least 184 ms
loss_block_size              1,024   1,024   8,192    32,768 pairs in at least 16.4 ms; by 4,096 20.2, by 1,024 27.6
similarity_precision         float32 float32 TF32     a GPU's matrix units know no float32: docs/design.md
embedding_gradient_precision float32 float32 bfloat16 32,768 pairs in at least 16.4 ms, by TF32 20.0
============================ ======= ======= ======== =================================================================

What GPUs get was chosen by the program that their compiler makes for one H200, of a step of 256 pairs with remat lite
(``python -m benchmarks.gpu_program --forms``, docs/performance.md). The least time of its kernels is a bound; nothing
has been timed yet. On a TPU blocks of 512 of the loss take a fifth longer by its compiler's estimate, and blocks of
2,048 as long. Products of plain matrices on CPU are chosen where a program is lowered (``layers.matrix_product``), and
the product for each is in ``attention.into_heads_by_position``.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp

from clip_jax.models.presets import CLIPPreset, ResNetPreset

Precision = jax.lax.Precision | jax.lax.DotAlgorithmPreset
FUSED_HEAD_WIDTHS = range(8, 129, 8)  # of cuDNN's attention, on every GPU that has it
FUSED_COMPUTE_CAPABILITY = 8.0  # Ampere


@dataclasses.dataclass(frozen=True)
class Backend:
    """The choices for one kind of device; those of a CPU by default.

    ``class_token_apart`` and ``fused_attention`` are fields of :class:`clip_jax.models.clip.CLIP`; ``unrolled_scan`` is
    whether all layers stand in one step of the scan where the backward pass finds their products saved; ``row_major``
    whether :func:`clip_jax.models.layers.shard_batch` says how activations lie in memory; ``loss_block_size`` and the
    two precisions, of products of float32 matrices, are the loss's.
    """

    class_token_apart: bool = False
    fused_attention: bool = False
    unrolled_scan: bool = False
    row_major: bool = False
    loss_block_size: int = 1_024
    similarity_precision: Precision = jax.lax.Precision.HIGHEST
    embedding_gradient_precision: Precision = jax.lax.Precision.HIGHEST

    def scan_unroll(self, remat: str) -> int:
        """Layers in one step of the scan, for what ``remat`` keeps: one, or more than any tower has."""
        return 1_000 if self.unrolled_scan and remat in ("none", "lite") else 1

    def model_options(self, preset: CLIPPreset, dtype: jnp.dtype, fused_attention: bool = True) -> dict[str, bool]:
        """Those of ``CLIP`` with this preset, computing in ``dtype``; cuDNN's attention has no float32."""
        towers = [preset.text] if isinstance(preset.vision, ResNetPreset) else [preset.vision, preset.text]
        fits = all(tower.width / tower.num_heads in FUSED_HEAD_WIDTHS for tower in towers)
        can = self.fused_attention and fits and jnp.dtype(dtype) == jnp.bfloat16
        return {"class_token_apart": self.class_token_apart, "fused_attention": fused_attention and can}


_CPU = Backend()
_TPU = Backend(class_token_apart=True)
_GPU = Backend(
    fused_attention=True,
    unrolled_scan=True,
    row_major=True,
    loss_block_size=8_192,
    similarity_precision=jax.lax.DotAlgorithmPreset.TF32_TF32_F32,
    embedding_gradient_precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
)
# Older than Ampere, or not NVIDIA's: without cuDNN's attention and TF32.
_OTHER_GPU = Backend(unrolled_scan=True, row_major=True, loss_block_size=8_192)


def backend_of(device: jax.Device) -> Backend:
    """The choices for a device, of this machine or of a topology that is compiled for."""
    if device.platform == "gpu":
        capability = str(getattr(device, "compute_capability", ""))  # "9.0" of an H200, "gfx942" of an MI300X
        is_recent = re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= FUSED_COMPUTE_CAPABILITY
        return _GPU if is_recent else _OTHER_GPU
    return _TPU if device.platform == "tpu" else _CPU
