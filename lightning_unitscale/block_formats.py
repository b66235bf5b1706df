"""Numbers whose blocks have scales of their own, along the dimension that a product sums over: mxfp8 and nvfp4.

    mxfp8    32 elements v share 2^e, e = ceil(log2(max|v| / 448)), in e8m0; each is e4m3(v / 2^e)
    nvfp4    16 elements v share c = e4m3(max|v| / 6); each is e2m1(v / c)

(OCP Microscaling Formats 1.0; e rounded up as in "Recipes for Pre-training LLMs with MXFP8", arXiv 2506.08027, so that
nothing saturates. "Pretraining Large Language Models with NVFP4", arXiv 2509.25149, section 2 and appendix C.) nvfp4's
blocks have little range, so its paper divides by a scale of the whole tensor, from its largest value, first. Here the
site's constant does so: at RMS 1, max|v| / 6 is in the middle of what e4m3 has. The paper also keeps some matrices in
bf16: the output head always, so readouts are left out (`formats.Format.kept_roles`), and the last blocks of a deep
model, which overrides={"model.layers.3?": {"format": None}} do.

They are emulated: values are rounded as the format would and stay in a dtype that holds them exactly, so products are
those of the format up to the order of accumulation, on any device, at no gain in speed or memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max


@dataclass(frozen=True)
class BlockNumbers(ABC):
    """Numbers in blocks.

    Attributes:
        size: how many elements share a scale.
        largest, normal, subnormal: as of `formats.Range`, over all scales that a block can have.
        dtype: of torch, that a device must have for the emulation.
    """

    size: int
    largest: float
    normal: float
    subnormal: float
    dtype: torch.dtype = _E4M3

    def rounded(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """The nearest numbers of the format.

        Args:
            tensor: of any dtype up to float32; what is not finite makes its whole block NaN.
            dim: along which the blocks lie; the last one may be shorter.

        Returns:
            A tensor of the same shape and dtype.
        """
        return self._by_blocks(tensor, dim, self._round)

    def rounded_at_random(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """Rounded up or down such that the mean is right, where the format's paper does so; else as `rounded`."""
        return self.rounded(tensor, dim)

    def _by_blocks(self, tensor: Tensor, dim: int, function: Callable[[Tensor], Tensor]) -> Tensor:
        last = tensor.float().movedim(dim, -1)
        length = last.shape[-1]
        blocks = F.pad(last, (0, -length % self.size)).unflatten(-1, (-1, self.size))
        return function(blocks).flatten(-2)[..., :length].movedim(-1, dim).to(tensor.dtype)

    @abstractmethod
    def _round(self, blocks: Tensor) -> Tensor:
        """Round blocks: (…, size), float32."""


class Mxfp8(BlockNumbers):
    """e4m3 in blocks of 32 with a power of two."""

    def _round(self, blocks: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True) / _LARGEST)  # in [½, 1) · 2^exponent
        exponent = exponent - (mantissa == 0.5).int()  # up, but a power of two is itself
        scale = torch.ldexp(torch.ones_like(mantissa), exponent.clamp(-126, 127))
        scale = torch.where(mantissa.isfinite(), scale, torch.nan)
        return (blocks / scale).clamp(-_LARGEST, _LARGEST).to(_E4M3).float() * scale


class Nvfp4(BlockNumbers):
    """e2m1 in blocks of 16 with an e4m3 number."""

    def rounded_at_random(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """As the base class says."""
        return self._by_blocks(tensor, dim, lambda blocks: self._round(blocks, torch.rand_like(blocks)))

    def rounded_in_squares(self, weight: Tensor, dims: tuple[int, int] = (0, 1)) -> Tensor:
        """In blocks of 16 × 16, so that a weight is the same in all its products; of any dtype.

        Args:
            dims: in which the squares lie; each matrix of these two has its own.
        """
        matrices = weight.float().movedim(dims, (-2, -1))
        height, width = matrices.shape[-2:]
        whole = F.pad(matrices, (0, -width % self.size, 0, -height % self.size))
        squares = whole.unflatten(-2, (-1, self.size)).unflatten(-1, (-1, self.size)).transpose(-3, -2)
        rounded = self._round(squares.flatten(-2)).view(squares.shape).transpose(-3, -2).reshape(whole.shape)
        return rounded[..., :height, :width].movedim((-2, -1), dims).to(weight.dtype)

    def _round(self, blocks: Tensor, random: Tensor | None = None) -> Tensor:
        scale = blocks.abs().amax(-1, keepdim=True) / 6
        scale = scale.clamp(torch.finfo(_E4M3).smallest_normal, _LARGEST).to(_E4M3).float()
        return e2m1(blocks * (1 / scale), random) * scale


def e2m1(tensor: Tensor, random: Tensor | None = None) -> Tensor:
    """To 0, ½, 1, 1½, 2, 3, 4 or 6 and their negatives: the nearest, halves to an even mantissa; beyond 6 to 6.

    Args:
        tensor: float32.
        random: uniform in [0, 1); with it each number goes up or down such that the mean is right.
    """
    size = tensor.abs().clamp(max=6.0)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    steps = size / step
    return ((steps.round() if random is None else (steps + random).floor()) * step).copysign(tensor)


# Of each 16 rows: the signs, drawn once, keep an even row from ending up in one place (appendix C.4).
_SIGNS = (1, -1, -1, 1, 1, 1, -1, 1, -1, -1, 1, -1, 1, 1, -1, -1)


def rotated(tensor: Tensor, dim: int = 0) -> Tensor:
    """Each 16 elements along a dimension times the same orthogonal matrix: a Hadamard matrix with random signs, over 4.

    An outlier is spread over 16 numbers. Of two operands whose product sums over this dimension both are rotated, which
    leaves the product as it is. It is filled up with zeros to a multiple of 16.
    """
    last = tensor.movedim(dim, -1)
    blocks = F.pad(last, (0, -last.shape[-1] % 16)).unflatten(-1, (-1, 16))
    signs = torch.tensor(_SIGNS, dtype=tensor.dtype, device=tensor.device)
    rotation = _hadamard(tensor) * signs / 4
    turned: Tensor = blocks @ rotation.t()
    return turned.flatten(-2).movedim(-1, dim)


def in_groups(rows: Tensor, ends: Tensor, size: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of blocks of `size` rows, where groups of rows share none: each is filled up with zeros.

    Args:
        rows: (n, …).
        ends: where each group ends, rising; (groups,). Rows after the last end are one more group.
        function: of rows; keeps their shape.
    """
    every, count = torch.arange(len(rows), device=rows.device), len(ends)
    group = torch.searchsorted(ends.contiguous(), every.to(ends.dtype), right=True)
    starts = F.pad(ends.long(), (1, 0))
    sizes = F.pad(ends.long(), (0, 1), value=len(rows)) - starts
    new_starts = F.pad(((sizes + size - 1) // size * size).cumsum(0), (1, 0))
    place = every - starts[group] + new_starts[group]
    apart = rows.new_zeros((-(-len(rows) // size) + count + 1) * size, *rows.shape[1:])
    return function(apart.index_copy(0, place, rows))[place]


def _hadamard(like: Tensor) -> Tensor:
    """Sylvester's, 16 × 16."""
    matrix = like.new_ones(1, 1)
    for _ in range(4):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


MXFP8 = Mxfp8(32, _LARGEST * 2.0**127, 2.0**-6 * 2.0**-126, 2.0**-9 * 2.0**-126)
NVFP4 = Nvfp4(16, 6 * _LARGEST, 2.0**-6, 2.0**-7)
