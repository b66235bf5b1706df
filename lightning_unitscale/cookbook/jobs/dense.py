"""A value for every pixel, by convolutions: classes, and depth."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale.cookbook.jobs.job import Batch, Job
from lightning_unitscale.cookbook.jobs.pictures import pasted_digits

CLASSES = 11


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()),
        *(nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()),
    )


class SegmentationUNet(Job):
    """A U-Net with BatchNorm; cross entropy of every pixel in nats."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        widths = [self.width * 2**level for level in range(self.depth + 1)]
        self.first = _convolutions(1, widths[0])
        self.down = nn.ModuleList(_convolutions(w, 2 * w) for w in widths[:-1])
        self.widen = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[:-1])
        self.up = nn.ModuleList(_convolutions(2 * w, w) for w in widths[:-1])
        self.last = nn.Conv2d(self.width, CLASSES, 1)

    def examples(self) -> tuple[Tensor, ...]:
        """Images and classes."""
        images, classes, _ = pasted_digits()
        return images, classes

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy."""
        images, classes = batch
        x, kept = self.first(images), []
        for block in self.down:
            kept.append(x)
            x = block(F.max_pool2d(x, 2))
        for widen, block in zip(reversed(self.widen), reversed(self.up), strict=True):
            x = block(torch.cat([widen(x), kept.pop()], dim=1))
        return F.cross_entropy(self.last(x), classes)


class Depth(Job):
    """A residual encoder without norms, and the head of monocular depth models; mean absolute error of the depth."""

    branch_outputs = ("blocks.*.2",)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        w = self.width
        self.first = nn.Conv2d(1, w, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(w, w, 3, padding=1), nn.ReLU(), nn.Conv2d(w, w, 3, padding=1))
            for _ in range(self.depth)
        )
        self.head = nn.Sequential(
            nn.Conv2d(w, w // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(w // 2, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, 1),
            nn.Softplus(),
        )

    def examples(self) -> tuple[Tensor, ...]:
        """Images and depths."""
        images, _, depths = pasted_digits()
        return images, depths

    def loss(self, batch: Batch) -> Tensor:
        """Mean absolute error."""
        images, depths = batch
        x = self.first(images)
        for block in self.blocks:
            x = x + block(F.relu(x))
        return F.l1_loss(self.head(x), depths)
