"""How far synthesised speech is from the real one, in decibels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_unitscale.cookbook.tasks.alignment import warped_distance

DECIBELS = 10 / math.log(10)  # in a natural logarithm of power


class MelDistance(Metric):
    """The mean absolute difference of log-mel spectrograms after dynamic time warping, a mean over utterances.

    Beside it stands what says the same always: the mean frame of all that is compared.
    """

    total: Tensor
    utterances: Tensor
    frames: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("utterances", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("frames", [], dist_reduce_fx="cat")

    def update(self, found: Tensor, true: Tensor) -> None:
        """One utterance: natural logarithms of power, [frames, bins] and [true frames, bins]."""
        self.total += DECIBELS * warped_distance(found, true)
        self.utterances += 1
        self.frames.append(true.detach().float())

    def compute(self) -> dict[str, Tensor]:
        """`mel_distance`, and `mean_frame_distance` of the mean frame in every place."""
        true = torch.cat(self.frames) if isinstance(self.frames, list) else self.frames
        constant = DECIBELS * (true - true.mean(0)).abs().mean()
        return {"mel_distance": self.total / self.utterances, "mean_frame_distance": constant}
