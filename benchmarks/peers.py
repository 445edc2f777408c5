"""Makes ``clip`` and ``open_clip`` importable where torchvision's compiled operators don't fit a CPU build of PyTorch.

Import this before ``clip`` or ``open_clip``. Both import torchvision, whose wheels are built for CUDA. With a CPU build
of PyTorch, its extension does not load, and the import fails on operators that neither peer uses. Declaring those
operators is enough.
"""

import contextlib

import torch

for operator in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):  # already declared, since the extension loaded
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
