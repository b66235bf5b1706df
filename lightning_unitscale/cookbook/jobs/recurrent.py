"""A recurrent language model; nats per byte."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale.cookbook.jobs.job import Batch, Job
from lightning_unitscale.cookbook.jobs.text import BYTES, text_crops


class LSTM(Job):
    """Embedding, layers of LSTM, readout."""

    def __init__(self, length: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.length = length
        self.embedding = nn.Embedding(BYTES, self.width)
        self.lstm = nn.LSTM(self.width, self.width, self.depth, batch_first=True)
        self.last = nn.Linear(self.width, BYTES)

    def examples(self) -> tuple[Tensor, ...]:
        """Crops that are one byte longer than the context."""
        return (text_crops(self.length + 1),)

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy."""
        (crops,) = batch
        hidden, _ = self.lstm(self.embedding(crops[:, :-1]))
        return F.cross_entropy(self.last(hidden).flatten(0, 1), crops[:, 1:].flatten())
