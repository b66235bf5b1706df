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
    images = torch.stack([image.pixels for image in found if isinstance(image.pixels, Tensor)])
    labels = torch.tensor([int(image.label) for image in found])
    return (images if size == 8 else F.interpolate(images, size=size, mode="bilinear")), labels


@cache
def pasted_digits(size: int = 20, count: int = 1280) -> tuple[Tensor, Tensor, Tensor]:
    """Two digits pasted at random places and depths on a canvas, the nearer over the farther.

    Returns:
        Images [count, 1, size, size]: darker the farther, with noise. Classes [count, size, size]: 0 for background,
        else the digit + 1. Depths [count, 1, size, size] from 1 to 4, 4 for background.
    """
    generator = torch.Generator().manual_seed(0)
    digits_, labels = digit_images()
    images = torch.zeros(count, 1, size, size)
    classes, depths = torch.zeros(count, size, size, dtype=torch.long), torch.full((count, 1, size, size), 4.0)
    for place in range(count):
        for depth in sorted((1 + 2 * torch.rand(2, generator=generator)).tolist(), reverse=True):
            which = int(torch.randint(len(labels), (), generator=generator))
            row, column = torch.randint(size - 7, (2,), generator=generator).tolist()
            at, ink = (slice(row, row + 8), slice(column, column + 8)), digits_[which, 0] > 0
            images[place, 0][at][ink] = 2 / depth
            classes[place][at][ink] = labels[which] + 1
            depths[place, 0][at][ink] = depth
    return images + 0.05 * torch.randn(images.shape, generator=generator), classes, depths
