"""Regression on a table of numbers: Friedman's first function (1991, equation 61); mean squared error."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale.cookbook.jobs.job import Batch, Job

INPUTS = 10


@cache
def friedman(count: int = 2304) -> tuple[Tensor, Tensor]:
    """Inputs [count, INPUTS] in [0, 1], of which five matter, and the target [count, 1] with mean 0 and std 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, INPUTS, generator=generator)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = y + torch.randn(count, generator=generator)
    return x, ((y - y.mean()) / y.std())[:, None]


class MLPRegression(Job):
    """ReLU layers without residuals."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        layers: list[nn.Module] = [nn.Linear(INPUTS, self.width), nn.ReLU()]
        for _ in range(self.depth):
            layers += [nn.Linear(self.width, self.width), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Linear(self.width, 1))

    def examples(self) -> tuple[Tensor, ...]:
        """Inputs and targets."""
        return friedman()

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error."""
        x, y = batch
        return F.mse_loss(self.model(x), y)
