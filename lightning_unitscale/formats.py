"""Number formats for the operands of matmuls, and the powers of two that bring an operand into one.

An operand t is cast as t̂ = cast(t · 2^k), and the product of two of them is divided by both powers:

    y  = x̂ ŵᵀ / (2^kx · 2^kw)        gx = ĝ ŵ / (2^kg · 2^kw)        gW = ĝᵀ x̂ / (2^kg · 2^kx)

    k = −round(log2 RMS(t))           so that RMS(t · 2^k) lies in [2^-½, 2^½]

Multiplying by a power of two is exact, so only the cast loses anything, and it loses the same over a wide range of
RMS: e4m3 2.7 % for normal data of RMS 2^-4 … 2^6, e5m2 5.3 % for 2^-12 … 2^10 (Unit Scaling, arXiv 2303.11257, figure
A.1, gives the same curves as SNR). A constant that is right to a factor of two therefore stays right, and is measured
rarely. Where the largest element would not fit, as with the massive outliers of pretrained language models, k is
smaller by up to 4, which costs nothing by the same curves.

e4m3 has no infinity: casting turns one into 448 (OCP 8-bit floating point specification 1.0, table 2), so whoever
looks for one looks before the cast.

Attention's own products have no weight: all their operands but the gradient are activations, whatever they are called.

With rows that have scales of their own ("fp8_rowwise") k is a vector, along a dimension that the product keeps: of the
weight's rows in y, and of features in the gradients (`ops.cast_product`). Each is a constant too, measured like the
others; nothing is known beforehand of a token, so x in y has one k.

Formats in which blocks of an operand have scales of their own (`block_formats`) take the same constants before those.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import floor, isfinite, log2

import torch
from torch import Tensor

from lightning_unitscale.block_formats import MXFP8, NVFP4, BlockNumbers

Numbers = torch.dtype | BlockNumbers  # what an operand is cast to
OPERANDS = ("x", "weight", "gradient")
ROOM_FOR_OUTLIERS = 4  # octaves below RMS 1 in which e4m3 is as accurate as at 1


def kind(operand: str) -> str:
    """Of "x" (any activation), "weight" and "gradient", what an operand is."""
    return operand if operand in OPERANDS else "x"


@dataclass(frozen=True)
class Format:
    """The numbers that the three operands of a matmul are cast to.

    Attributes:
        by_rows: whether rows of a matrix have scales of their own.
        kept_roles: of weights whose matmuls stay in the compute dtype, as the format's source has it.
    """

    name: str
    x: Numbers
    weight: Numbers
    gradient: Numbers
    by_rows: bool = False
    kept_roles: tuple[str, ...] = ()

    def numbers(self, operand: str) -> Numbers:
        """Of an operand by name."""
        numbers: Numbers = getattr(self, kind(operand))
        return numbers

    @property
    def has_blocks(self) -> bool:
        """Whether blocks of an operand have scales of their own."""
        return isinstance(self.x, BlockNumbers)

    @property
    def dtypes(self) -> list[torch.dtype]:
        """What a device must have, each once."""
        numbers = [self.numbers(operand) for operand in OPERANDS]
        return list(dict.fromkeys(each.dtype if isinstance(each, BlockNumbers) else each for each in numbers))


FORMATS = {
    "fp8": Format("fp8", torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e5m2),
    "fp8_e4m3": Format("fp8_e4m3", torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e4m3fn),
    "fp8_rowwise": Format("fp8_rowwise", torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e5m2, by_rows=True),
    "mxfp8": Format("mxfp8", MXFP8, MXFP8, MXFP8),
    "nvfp4": Format("nvfp4", NVFP4, NVFP4, NVFP4, kept_roles=("readout",)),
    "fp16": Format("fp16", torch.float16, torch.float16, torch.float16),
    "bf16": Format("bf16", torch.bfloat16, torch.bfloat16, torch.bfloat16),
}


@dataclass(frozen=True)
class Range:
    """The positive numbers that a format has.

    Attributes:
        largest: the largest finite one; what is above saturates to it.
        normal: the smallest with full precision.
        subnormal: the smallest above 0; half of it and less is flushed to 0.
    """

    largest: float
    normal: float
    subnormal: float


@cache
def range_of(numbers: Numbers) -> Range:
    """The range of a floating-point dtype, or of numbers in blocks."""
    if isinstance(numbers, BlockNumbers):
        return Range(numbers.largest, numbers.normal, numbers.subnormal)
    info = torch.finfo(numbers)
    return Range(info.max, info.smallest_normal, info.smallest_normal * info.eps)


# The 8-bit formats that torch's own cast leaves on overflow, to infinity or NaN. e5m2 always does; e4m3 saturates from
# torch 2.12 on (pytorch/pytorch#178817; the conversion that CPU and CUDA share).
_OVERFLOWING = frozenset(
    dtype for dtype in (torch.float8_e4m3fn, torch.float8_e5m2) if not torch.tensor(1e6).to(dtype).float().isfinite()
)


def cast(tensor: Tensor, dtype: torch.dtype, scale: Tensor | float = 1.0) -> Tensor:
    """`tensor · scale` in another dtype, saturating; NaN stays NaN, infinity becomes the largest number.

    (bfloat16, with the range of float32, keeps infinity.)

    Args:
        tensor: of any floating-point dtype.
        dtype: see `FORMATS`.
        scale: a power of two, as a number or a 0-dim tensor.
    """
    if tensor.dtype == torch.float16:
        tensor = tensor.float()  # on CUDA the scale would be rounded to float16, and most powers of two are none
    scaled, largest = tensor * scale, torch.finfo(dtype).max
    if dtype == torch.float16:  # overflows to infinity; clamped afterwards, as bfloat16 has no 65504 to clamp to
        return scaled.to(dtype).clamp(-largest, largest)
    if dtype in _OVERFLOWING:
        scaled = scaled.clamp(-largest, largest)
    return scaled.to(dtype)


def exponent(rms: float, largest: float, numbers: Numbers) -> int:
    """The k for an operand with this RMS and this largest absolute value; 0 for one that is all zero."""
    if not rms or not isfinite(rms):
        return 0
    k = -round(log2(rms))
    if isfinite(largest) and largest > 0:
        fits = floor(log2(range_of(numbers).largest / largest))
        k = max(min(k, fits), k - ROOM_FOR_OUTLIERS)
    return k


def exponents(rms: Tensor, largest: Tensor, numbers: Numbers, otherwise: int) -> Tensor:
    """`exponent` of each row; what is said otherwise of rows that are all zero. Of the shape of both, int32."""
    k = -torch.log2(rms.double()).round()
    fits = torch.log2(range_of(numbers).largest / largest.double()).floor()
    k = torch.maximum(torch.minimum(k, fits), k - ROOM_FOR_OUTLIERS)
    return torch.where(rms.isfinite() & (rms > 0), k, otherwise).int()


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tensors can be cast to `dtype` and back on the device."""
    try:
        torch.ones(1, device=device).to(dtype).to(torch.float32)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True
