"""Handwritten digits as tensors: alone, and pasted on a canvas."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_unitscale.cookbook.data.digits import digits


@cache
def digit_images(size: int = 8) -> tuple[Tensor, Tensor]:
    """Images [1797, 1, size, size] in [-1, 1], and labels; the last ones are by other writers than the first."""
    found = digits()
    images = torch.stack([image.pixels for image in found])
    labels = torch.tensor([int(image.label) for image in found])
    return (images if size == 8 else F.interpolate(images, size=size, mode="bilinear")), labels
