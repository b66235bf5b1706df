"""How the magnitudes of a tensor are spread over the powers of two: what a floating-point format has to hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

LOWEST, HIGHEST = -100, 60  # exponents beyond are counted here


@dataclass(frozen=True)
class ExponentHistogram:
    """How many elements t have floor(log2 |t|) = first, first + 1, …; zeros and non-finite elements are not counted."""

    first: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, counts: Tensor) -> ExponentHistogram:
        """From `count_exponents`, without the empty bins at both ends."""
        numbers = counts.tolist()
        filled = [position for position, number in enumerate(numbers) if number]
        if not filled:
            return cls(0, ())
        return cls(LOWEST + filled[0], tuple(numbers[filled[0] : filled[-1] + 1]))

    @classmethod
    def merged(cls, histograms: Iterable[ExponentHistogram]) -> ExponentHistogram:
        """Of all their elements together."""
        total: Counter[int] = Counter()
        for histogram in histograms:
            total.update(dict(enumerate(histogram.counts, start=histogram.first)))
        if not total:
            return cls(0, ())
        first, last = min(total), max(total)
        return cls(first, tuple(total[exponent] for exponent in range(first, last + 1)))

    def quantile(self, share: float) -> int | None:
        """The smallest exponent e such that at least this share of the elements has one of at most e."""
        wanted = share * sum(self.counts)
        for exponent, reached in enumerate(accumulate(self.counts), start=self.first):
            if reached >= wanted:
                return exponent
        return None


@torch.no_grad()
def count_exponents(tensor: Tensor) -> Tensor:
    """Number of elements by exponent, LOWEST to HIGHEST; shape [HIGHEST - LOWEST + 1], on the tensor's device."""
    values = tensor.detach().float().flatten()
    values = values[(values != 0) & values.isfinite()]
    exponents = torch.frexp(values).exponent.long() - 1  # frexp's mantissa lies in [1/2, 1)
    return torch.bincount(exponents.clamp(LOWEST, HIGHEST) - LOWEST, minlength=HIGHEST - LOWEST + 1)
