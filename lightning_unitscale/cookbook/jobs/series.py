"""Forecasting time series with PatchTST (Nie et al., arXiv 2211.14730) of `transformers`; mean squared error."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PatchTSTForPrediction

from lightning_unitscale.cookbook.jobs.job import Batch, Job

PAST, FUTURE, CHANNELS = 48, 12, 2


@cache
def seasons(count: int = 1280) -> Tensor:
    """Series [count, PAST + FUTURE, CHANNELS]: two seasons, a trend, and a noise that remembers."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(PAST + FUTURE)[None, :, None]
    period, phase, size, slope = torch.rand(4, count, 1, CHANNELS, generator=generator)
    noise = torch.zeros(count, PAST + FUTURE, CHANNELS)
    for step in range(1, PAST + FUTURE):
        noise[:, step] = 0.7 * noise[:, step - 1] + 0.1 * torch.randn(count, CHANNELS, generator=generator)
    long = torch.sin(6.28 * (time / (12 + 12 * period) + phase))
    short = (0.3 + size) * torch.sin(6.28 * (time / 6 + size))
    series: Tensor = long + short + (slope - 0.5) * time / 20 + noise
    return series


class PatchTST(Job):
    """Patches of a series through a transformer with BatchNorm."""

    branch_outputs = ("*.out_proj", "*.ff.3")

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        config: Any = AutoConfig.for_model(
            "patchtst",
            num_input_channels=CHANNELS,
            context_length=PAST,
            prediction_length=FUTURE,
            patch_length=8,
            patch_stride=4,
            d_model=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.width // 16,
            ffn_dim=4 * self.width,
            loss="mse",
            scaling="std",
            **{f"{part}_dropout": 0.0 for part in ("attention", "positional", "path", "ff", "head")},
        )
        self.model: nn.Module = PatchTSTForPrediction(config)

    def examples(self) -> tuple[Tensor, ...]:
        """Series."""
        return (seasons(),)

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of what comes."""
        (series,) = batch
        predicted = self.model(past_values=series[:, :PAST]).prediction_outputs
        return F.mse_loss(predicted, series[:, PAST:])
