"""Laying two sequences along each other: letters along the frames of what is said, and one utterance along another.

monotonic alignment search    (Kim et al., 2020, arXiv 2005.11129): every letter gets one frame or more, in order,
                              such that the sum of scores is largest
dynamic time warping          (Sakoe and Chiba, 1978): symmetric, diagonal steps count twice, over n + m
"""

from __future__ import annotations

import math

import numpy
import torch
from torch import Tensor

OFF_DIAGONAL = 50.0  # what a letter loses that is said a whole utterance too early or too late


@torch.no_grad()
def monotonic_alignment(scores: Tensor, letters: Tensor, frames: Tensor) -> Tensor:
    """How many frames each letter has, [batch, most letters]; 0 for padding.

    Letters at their place in proportion are preferred a little, which decides while scores say nothing yet (Badlani et
    al., 2021, arXiv 2108.10447).

    Args:
        scores: [batch, most letters, most frames], how well they go together.
        letters: [batch], how many there are.
        frames: [batch], how many there are; no fewer than letters.
    """
    batch, most, longest = scores.shape
    place = torch.arange(most, device=scores.device)[None, :, None] / letters[:, None, None]
    time = torch.arange(longest, device=scores.device)[None, None] / frames[:, None, None]
    scores = scores - OFF_DIAGONAL * (place - time).square()
    best = torch.full((batch, most), -math.inf, device=scores.device)
    best[:, 0] = scores[:, 0, 0]
    stays = torch.zeros(longest, batch, most, dtype=torch.bool, device=scores.device)
    for frame in range(1, longest):
        from_before = torch.nn.functional.pad(best, (1, 0), value=-math.inf)[:, :-1]
        stays[frame] = best > from_before
        best = torch.maximum(best, from_before) + scores[:, :, frame]

    durations = torch.zeros(batch, most, dtype=torch.long, device=scores.device)
    letter, rows = letters - 1, torch.arange(batch, device=scores.device)
    for frame in range(longest - 1, -1, -1):
        inside = frame < frames
        durations[rows, letter] += inside.long()
        letter = letter - (inside & ~stays[frame, rows, letter] & (letter > 0)).long()
    return durations


def warped_distance(one: Tensor, other: Tensor) -> float:
    """The mean absolute difference of two sequences, [n, numbers] and [m, numbers], each as slow as it fits best."""
    costs = (one[:, None] - other[None]).abs().mean(-1).double().cpu().numpy()  # [n, m]
    best = numpy.cumsum(costs[0]) + costs[0, 0]  # the first pair counts twice
    for row in costs[1:]:
        diagonal = numpy.concatenate([[numpy.inf], best[:-1] + 2 * row[1:]])
        along = numpy.cumsum(row)
        best = along + numpy.minimum.accumulate(numpy.minimum(best + row, diagonal) - along)
    return float(best[-1]) / sum(costs.shape)
