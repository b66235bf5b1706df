"""What each row and column of a matrix operand is like, for scales of rows (`format="fp8_rowwise"`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_unitscale.engine.runtime.operand_statistics import Accumulator
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.formats import Numbers, exponents


class RowAccumulator(Accumulator):
    """As its base class, with sums for each index of some dimensions.

    Args:
        sizes: of the dimensions that are summed up, by dimension.
    """

    def __init__(self, numbers: Numbers, scale: float | None, sizes: Mapping[int, int], device: torch.device) -> None:
        super().__init__(numbers, scale)
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        self.squares = {dim: nothing.new_zeros(size) for dim, size in sizes.items()}
        self.row_largest = {dim: nothing.new_zeros(size) for dim, size in sizes.items()}
        self.counts = {dim: nothing.clone() for dim in sizes}

    @torch.no_grad()
    def add(self, tensor: Tensor) -> None:
        """Count one tensor in.

        Raises:
            UnitScalingError: a part of it is elsewhere.
        """
        super().add(tensor)
        for dim, squares in self.squares.items():
            if tensor.numel() == 0:
                continue
            values = tensor.detach().movedim(dim, -1).flatten(0, -2)
            if type(values) not in (Tensor, torch.nn.Parameter) or values.shape[-1] != len(squares):
                raise UnitScalingError(
                    f"format='fp8_rowwise' has a scale for each of {len(squares)} rows, and this operand is a "
                    f"{type(tensor).__name__} of {list(tensor.shape)}: under tensor parallelism use format='fp8'."
                )
            finite = torch.where(values.isfinite(), values, 0).float()
            squares += finite.square().sum(0)
            self.row_largest[dim] = torch.maximum(self.row_largest[dim], finite.abs().amax(0).double())
            self.counts[dim] += len(values)

    def add_over_processes(self) -> None:
        """Hold what all processes saw; all of them must ask."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        for dim, squares in self.squares.items():
            dist.all_reduce(squares)
            dist.all_reduce(self.counts[dim])
            dist.all_reduce(self.row_largest[dim], op=dist.ReduceOp.MAX)

    def exponents(self, dim: int, otherwise: int) -> list[int]:
        """k of each index of a dimension; what is said otherwise where all was zero."""
        rms = (self.squares[dim] / self.counts[dim].clamp(min=1)).sqrt()
        found: list[int] = exponents(rms, self.row_largest[dim], self.numbers, otherwise).tolist()
        return found
