"""Makes ``clip`` and ``open_clip`` importable where torchvision's compiled operators don't fit a CPU build of PyTorch.

It also has the optimizer of open_clip's training script.

Import this before ``clip`` or ``open_clip``. Both import torchvision, whose wheels are built for CUDA. With a CPU build
of PyTorch, its extension does not load, and the import fails on operators that neither peer uses. Declaring those
operators is enough.
"""

import contextlib

import ml_collections
import torch

for operator in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):  # already declared, since the extension loaded
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


def open_clip_optimizer(model: torch.nn.Module, settings: ml_collections.ConfigDict) -> torch.optim.AdamW:
    """Returns fused AdamW with the values of ``config.optimizer``; parameters of fewer than two axes do not decay."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": settings.weight_decay}],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )
