"""What an operand of a matmul looks like to a number format, summed up over calls without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log10, sqrt

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_unitscale.engine.record.spread_tensors import part_of
from lightning_unitscale.formats import Numbers
from lightning_unitscale.ops.cast_sums import SUMS, cast_sums
from lightning_unitscale.ops.fp8_cast import FP8, fp8_cast


@dataclass(frozen=True)
class Statistics:
    """One operand of one site, over all calls that were seen.

    Attributes:
        elements: number of elements.
        rms: root mean square of the finite ones.
        largest: largest finite absolute value.
        flushed: share of the elements other than 0 that the cast turned into 0.
        saturated: share of the elements that lie beyond the largest number of the format.
        error: RMS of what the cast changed, relative to `rms`.
        non_finite: number of NaN and infinite elements.
        kurtosis: mean fourth power over the squared mean square of the finite ones: 3 for normal numbers, more with
            outliers, at most the number of elements; None in a file of an earlier version, and of zeros.
    """

    elements: int
    rms: float
    largest: float
    flushed: float
    saturated: float
    error: float
    non_finite: int
    kurtosis: float | None = None

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio of the cast in dB; infinite where it changed nothing."""
        return -20 * log10(self.error) if self.error else inf


class Accumulator:
    """Sums over the calls of one operand, kept on its device.

    Args:
        numbers: what the operand is, or would be, cast to.
        scale: the power of two in front of the cast; None for one that brings each tensor to an RMS of about 1.
    """

    def __init__(self, numbers: Numbers, scale: float | None = 1.0) -> None:
        self.numbers, self.scale = numbers, scale
        self.sums: Tensor | None = None  # the number of elements, then `SUMS` but the largest
        self.largest: Tensor | None = None

    @torch.no_grad()
    def add(self, tensor: Tensor) -> None:
        """Count one tensor in; of one spread over processes the part that is here."""
        tensor = part_of(tensor)
        if tensor.numel() == 0:
            return
        tensor = tensor.detach()
        scale = (
            torch.tensor(self.scale, dtype=torch.float32, device=tensor.device)
            if self.scale is not None
            else _scale_to_one(tensor)
        )
        if isinstance(self.numbers, torch.dtype) and self.numbers in FP8:
            matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1)
            _, _, found = fp8_cast(matrix, scale, self.numbers, rows=False, measured=True)
        else:
            found = cast_sums(tensor, self.numbers, scale)
        *sums, largest = found.unbind()
        counted = torch.stack([torch.full_like(largest, tensor.numel()), *sums])
        self.sums = counted if self.sums is None else self.sums + counted
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    def add_over_processes(self) -> None:
        """Hold what all processes saw of what `add_over_processes` leaves out; all of them must ask."""

    def include(self, other: Accumulator) -> None:
        """Count in what another one saw, in this process or another."""
        if other.sums is None or other.largest is None:
            return
        sums, largest = other.sums, other.largest
        self.sums = sums if self.sums is None else self.sums + sums.to(self.sums)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest.to(self.largest))

    def result(self) -> Statistics | None:
        """What was seen; None if nothing was."""
        if self.sums is None or self.largest is None:
            return None
        elements, squares, non_zero, flushed, saturated, errors, non_finite, fourth = self.sums.tolist()
        return Statistics(
            elements=int(elements),
            rms=sqrt(squares / elements),
            largest=float(self.largest),
            flushed=flushed / non_zero if non_zero else 0.0,
            saturated=saturated / elements,
            error=sqrt(errors / squares) if squares else 0.0,
            non_finite=int(non_finite),
            kurtosis=elements * fourth / squares**2 if squares else None,
        )


def _scale_to_one(tensor: Tensor) -> Tensor:
    """The power of two that brings the tensor to an RMS of about 1; 0-dim."""
    squares = torch.where(tensor.isfinite(), tensor, 0).float().square().sum()
    scale = torch.exp2(-torch.log2((squares / tensor.numel()).sqrt()).round())
    return torch.where(squares > 0, scale, 1.0)


def add_over_processes(accumulators: Sequence[Accumulator], device: torch.device) -> None:
    """Make every process's accumulators hold what all of them saw; they must come in the same order everywhere."""
    if not (dist.is_available() and dist.is_initialized()) or not accumulators:
        return
    nothing = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
    sums = torch.stack([nothing if a.sums is None else a.sums for a in accumulators])
    largest = torch.stack([nothing[0] if a.largest is None else a.largest for a in accumulators])
    dist.all_reduce(sums)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    for position, accumulator in enumerate(accumulators):
        accumulator.add_over_processes()
        if sums[position, 0] > 0:
            accumulator.sums, accumulator.largest = sums[position], largest[position]
