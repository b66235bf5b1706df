"""What a training step of a run takes of the processor: the median of its steps, which leaves preparation out."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import pytorch_lightning as pl


class StepTime(pl.Callback):
    """Takes the time that this process has computed in, so that other programs on the machine count little."""

    def __init__(self) -> None:
        self.begin = 0.0
        self.steps: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Called before every step."""
        self.begin = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        """Called after every step."""
        self.steps.append(time.process_time() - self.begin)

    @property
    def seconds(self) -> float | None:
        """Of all threads; None before the first step."""
        return round(median(self.steps), 6) if self.steps else None
