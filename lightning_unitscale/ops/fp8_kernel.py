"""The kernel of `fp8_cast` in Triton: one program for each tile of the operand, which it reads once.

Rounding to nearest, ties to even, on the bits of float32. With p bits of mantissa, d = 23 − p of them go:

    normal       (b + 2^(d-1) − 1 + bit d of b) >> d, then the exponent's bias is exchanged     b: bits of |v|
    subnormal    |v| + 2^23 u − 2^23 u, u the smallest subnormal: float32's own addition rounds to multiples of u

(OCP 8-bit floating point specification 1.0; ties as IEEE 754.) Saturation is a minimum of bits, as those of positive
numbers are in order, infinity above all. GPUs of compute capability 8.9 and above round in one instruction instead.

Imported only where Triton is there. Triton decides at import whether it interprets (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_unitscale.formats import range_of
from lightning_unitscale.ops.cast_sums import SUMS
from lightning_unitscale.ops.fp8_cast import outputs, padded

BLOCK = 64  # a tile's rows and columns: both layouts are written in runs of 64 bytes


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types here
def _encode(v, MANTISSA: tl.constexpr, LARGEST: tl.constexpr, NORMAL: tl.constexpr, SUBNORMAL: tl.constexpr):  # type: ignore[no-untyped-def]  # triton has no types here
    """The codes of float32 numbers."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    bits = v.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    is_nan = magnitude > 0x7F800000
    magnitude = tl.minimum(magnitude, tl.full((), LARGEST, tl.float32).to(tl.int32, bitcast=True))
    normal = (magnitude + ((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1)) >> DROPPED
    # NORMAL has the code 1 << MANTISSA
    lowest = tl.full((), NORMAL, tl.float32).to(tl.int32, bitcast=True)
    normal = normal - (lowest >> DROPPED) + (1 << MANTISSA)
    magic = tl.full((), SUBNORMAL * 8388608.0, tl.float32)
    subnormal = (magnitude.to(tl.float32, bitcast=True) + magic).to(tl.int32, bitcast=True)
    subnormal = subnormal - magic.to(tl.int32, bitcast=True)
    code = tl.where(magnitude < lowest, subnormal, normal)
    return (tl.where(is_nan, 0x7F, code) | sign).to(tl.uint8)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types here
def _decode(code, MANTISSA: tl.constexpr, NORMAL: tl.constexpr, SUBNORMAL: tl.constexpr):  # type: ignore[no-untyped-def]  # triton has no types here
    """The absolute values that codes of finite numbers stand for."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    magnitude = code.to(tl.int32) & 0x7F
    lowest = tl.full((), NORMAL, tl.float32).to(tl.int32, bitcast=True)
    normal = ((magnitude << DROPPED) - (1 << 23) + lowest).to(tl.float32, bitcast=True)
    return tl.where(magnitude < (1 << MANTISSA), magnitude.to(tl.float32) * SUBNORMAL, normal)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types here
def _scaled(t, scale, i, j, height, width, ALONG: tl.constexpr):  # type: ignore[no-untyped-def]  # triton has no types here
    """A tile times one number (0), one for each row (1), or one for each column (2)."""
    if ALONG == 0:
        v = t * tl.load(scale)
    elif ALONG == 1:
        v = t * tl.load(scale + i, mask=i < height, other=1.0)[:, None]
    else:
        v = t * tl.load(scale + j, mask=j < width, other=1.0)[None, :]
    return v


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types here
def _code(  # type: ignore[no-untyped-def]  # triton has no types here
    v, MANTISSA: tl.constexpr, LARGEST: tl.constexpr, NORMAL: tl.constexpr, SUBNORMAL: tl.constexpr,
    IN_HARDWARE: tl.constexpr,
):  # fmt: skip
    """The codes of float32 numbers, by the device's own instruction where it has one."""
    if IN_HARDWARE:
        clamped = tl.clamp(v, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        if MANTISSA == 3:
            code = clamped.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            code = clamped.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        code = _encode(v, MANTISSA, LARGEST, NORMAL, SUBNORMAL)
    return code


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types here
def cast_tile(  # type: ignore[no-untyped-def]  # triton has no types here
    source, scale, column_scale, rows, columns, sums,
    height, width, padded_height, padded_width, down, right,
    MANTISSA: tl.constexpr, LARGEST: tl.constexpr, NORMAL: tl.constexpr, SUBNORMAL: tl.constexpr,
    IN_HARDWARE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MEASURED: tl.constexpr, BLOCK: tl.constexpr,
    ALONG: tl.constexpr, COLUMNS_ALONG: tl.constexpr, TWO_SCALES: tl.constexpr,
):  # fmt: skip
    """One tile in both layouts, and its sums; see `fp8_cast`."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < height)[:, None] & (j < width)[None, :]
    t = tl.load(source + i[:, None] * down + j[None, :] * right, mask=inside, other=0.0).to(tl.float32)
    v = _scaled(t, scale, i, j, height, width, ALONG)
    code = _code(v, MANTISSA, LARGEST, NORMAL, SUBNORMAL, IN_HARDWARE)
    if ROWS:
        here = (i < padded_height)[:, None] & (j < padded_width)[None, :]
        tl.store(rows + i[:, None] * padded_width + j[None, :], code, mask=here)
    if COLUMNS:
        there = (j < padded_width)[:, None] & (i < padded_height)[None, :]
        if TWO_SCALES:
            other = _scaled(t, column_scale, i, j, height, width, COLUMNS_ALONG)
            other = _code(other, MANTISSA, LARGEST, NORMAL, SUBNORMAL, IN_HARDWARE)
        else:
            other = code
        tl.store(columns + j[:, None] * padded_height + i[None, :], tl.trans(other), mask=there)
    if MEASURED:
        # Of the scaled numbers, which are near 1, so that no power of them leaves float32; unscaled in `run`.
        finite = (t.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
        v = tl.where(finite, v, 0.0)
        size = tl.abs(v)
        kept = tl.where(finite, _decode(code, MANTISSA, NORMAL, SUBNORMAL), 0.0)
        square = v * v
        tile = sums + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * 8
        tl.store(tile, tl.sum(square))
        tl.store(tile + 1, tl.sum((size > 0).to(tl.float32)))
        tl.store(tile + 2, tl.sum(((size > 0) & (kept == 0)).to(tl.float32)))
        tl.store(tile + 3, tl.sum((size > LARGEST).to(tl.float32)))
        tl.store(tile + 4, tl.sum((kept - size) * (kept - size)))
        tl.store(tile + 5, tl.sum((inside & (finite == 0)).to(tl.float32)))
        tl.store(tile + 6, tl.sum(square * square))
        tl.store(tile + 7, tl.max(size))


def run(
    tensor: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    rows: bool,
    columns: bool,
    alignment: int,
    measured: bool,
    column_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fp8_cast`, of a tensor that is not empty."""
    if tensor.stride(0) < tensor.stride(1):  # read along memory
        first, second = (scale, None) if column_scale is None else (column_scale, scale.t())
        column_major, row_major, sums = run(tensor.t(), first.t(), dtype, columns, rows, alignment, measured, second)
        return row_major, column_major, sums
    row_major, column_major, sums = outputs(tensor, dtype, rows, columns, alignment, measured)
    height, width = tensor.shape
    padded_height, padded_width = (padded(size, alignment) for size in tensor.shape)
    grid = triton.cdiv(padded_height, BLOCK), triton.cdiv(padded_width, BLOCK)
    other = scale if column_scale is None else column_scale
    tiles = tensor.new_empty((grid[0] * grid[1], len(SUMS)) if measured else 0, dtype=torch.float32)
    cast_tile[grid](
        tensor, scale.flatten(), other.flatten(), row_major.view(torch.uint8), column_major.view(torch.uint8), tiles,
        height, width, padded_height, padded_width, tensor.stride(0), tensor.stride(1),
        **constants(dtype),
        IN_HARDWARE=rounds_in_hardware(tensor.device), ROWS=rows, COLUMNS=columns, MEASURED=measured, BLOCK=BLOCK,
        ALONG=_along(scale), COLUMNS_ALONG=_along(other), TWO_SCALES=column_scale is not None,
    )  # fmt: skip
    if measured:
        sums.copy_(_unscaled(tiles.double(), scale.double()))
    return row_major, column_major, sums


def _along(scale: Tensor) -> int:
    """What `_scaled` calls the dimension that a scale lies along."""
    return 0 if scale.numel() == 1 else 1 if scale.shape[1] == 1 else 2


def constants(dtype: torch.dtype) -> dict[str, float]:
    """What the kernel has to know of a format."""
    limits = range_of(dtype)
    mantissa = round(-log2(torch.finfo(dtype).eps))
    return {"MANTISSA": mantissa, "LARGEST": limits.largest, "NORMAL": limits.normal, "SUBNORMAL": limits.subnormal}


def _unscaled(tiles: Tensor, scale: Tensor) -> Tensor:
    """The sums over all tiles, of the operand as it was."""
    squares, non_zero, flushed, saturated, errors, non_finite, fourth, _ = tiles.sum(0)
    square = scale * scale
    largest = tiles[:, -1].max() / scale
    sums = (squares / square, non_zero, flushed, saturated, errors / square, non_finite, fourth / square**2, largest)
    return torch.stack(sums)


def rounds_in_hardware(device: torch.device) -> bool:
    """Whether the device casts to FP8 in one instruction."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
