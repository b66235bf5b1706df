"""Which lower half of a digit belongs to which upper half? Two towers as in CLIP (Radford et al., arXiv 2103.00020)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale.cookbook.jobs.job import Batch, Job
from lightning_unitscale.cookbook.jobs.pictures import digit_images


class _ConvolutionalTower(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)),
            *(nn.GELU(), nn.Flatten(), nn.Linear(16 * width, width, bias=False)),
        )

    def forward(self, half: Tensor) -> Tensor:
        """[batch, 1, 4, 8] -> [batch, width] of length 1."""
        return F.normalize(self.layers(half), dim=-1)


class _TransformerTower(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.rows = nn.Linear(8, width)
        self.positions = nn.Parameter(0.02 * torch.randn(4, width))
        layer = nn.TransformerEncoderLayer(
            width, width // 16, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, width, bias=False)

    def forward(self, half: Tensor) -> Tensor:
        """[batch, 1, 4, 8] -> [batch, width] of length 1."""
        x = self.encoder(self.rows(half[:, 0]) + self.positions)
        return F.normalize(self.last(self.norm(x).mean(1)), dim=-1)


class TwoTowers(Job):
    """A convolutional and a transformer tower with a learned temperature; cross entropy both ways in nats."""

    branch_outputs = ("*.out_proj", "*.linear2")

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.upper, self.lower = _ConvolutionalTower(self.width), _TransformerTower(self.width, self.depth)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def examples(self) -> tuple[Tensor, ...]:
        """Images."""
        return (digit_images()[0],)

    def loss(self, batch: Batch) -> Tensor:
        """Each half among those of the batch."""
        (images,) = batch
        logits = self.logit_scale.exp() * self.upper(images[:, :, :4]) @ self.lower(images[:, :, 4:]).T
        own = torch.arange(len(images))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
