"""An operand read once, and written in FP8 in the layouts that its products read.

    rows       cast(t · s)      t: (m, n), padded to (m', n'), row-major
    columns    cast(t · s)ᵀ     (n', m'), row-major
    sums       what the cast loses, on the steps that are measured (`cast_sums`)

m' and n' are the next multiples of `alignment`; what is added is zero. Of the three products of a matrix product each
operand goes into two, once as rows and once as columns (see `multiply`), so an operand of 2 bytes an element moves

    2 (read) + 1 (rows) + 1 (columns) = 4 bytes an element, in one pass,

where scaling (2 + 2), clamping (2 + 2), casting (2 + 1) and copying to the other layout (1 + 1) are four passes and 13.

It is one operation to autograd, the compiler and sharding, and has no gradient: casts belong to the Function around
them (`cast_product`). On CUDA it is a kernel in Triton (`fp8_kernel`); elsewhere, and without Triton, torch's own
operations, with the same values to the bit (a NaN stays NaN, whichever).
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from os import environ
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_unitscale.formats import cast
from lightning_unitscale.ops.cast_sums import SUMS, cast_sums
from lightning_unitscale.warn_user import warn_user

FP8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})

OLDEST_TRITON = (3, 4)
_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def fp8_cast(
    tensor: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    *,
    rows: bool = True,
    columns: bool = False,
    alignment: int = 1,
    measured: bool = False,
    column_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`tensor · scale` in an 8-bit format, saturating; NaN stays NaN, infinity becomes the largest number.

    Args:
        tensor: 2-D, of any floating-point dtype and strides.
        scale: powers of two; float32, on the tensor's device: 0-dim, or (m, 1), or (1, n) for a tensor of (m, n).
        dtype: float8_e4m3fn or float8_e5m2.
        rows, columns: which layouts to write.
        alignment: of both sizes of what is written.
        measured: whether to sum up what the cast does with `scale`, which is 0-dim then.
        column_scale: as `scale`, of the second layout; None for the same.

    Returns:
        The two layouts and the sums of `cast_sums`; each empty where it was not asked for.
    """
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.lightning_unitscale.fp8_cast(
        tensor, scale, dtype, rows, columns, alignment, measured, column_scale
    )
    return result


# Plainer than `torch.library.custom_op`, whose checks at each call cost as much as a small product.
_LIBRARY = torch.library.Library("lightning_unitscale", "FRAGMENT")
_LIBRARY.define(
    "fp8_cast(Tensor tensor, Tensor scale, ScalarType dtype, bool rows, bool columns, int alignment, bool measured, "
    "Tensor? column_scale=None) -> (Tensor, Tensor, Tensor)"
)


def _run(tensor: Tensor, scale: Tensor, dtype: torch.dtype, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    if tensor.dtype in _KERNEL_DTYPES and tensor.numel() and _has_kernel(tensor.device):
        kernel = import_module("lightning_unitscale.ops.fp8_kernel")
        return kernel.run(tensor, scale, dtype, *options)  # type: ignore[no-any-return]  # triton has no types here
    return in_torch(tensor, scale, dtype, *options)


def in_torch(
    tensor: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    rows: bool,
    columns: bool,
    alignment: int,
    measured: bool,
    column_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fp8_cast` by torch's own operations."""
    row_major, column_major, sums = outputs(tensor, dtype, rows, columns, alignment, measured)

    def narrow(scale: Tensor) -> Tensor:
        height, width = tensor.shape
        padding = (0, padded(width, alignment) - width, 0, padded(height, alignment) - height)
        return F.pad(cast(tensor, dtype, scale).view(torch.uint8), padding)

    codes = narrow(scale) if rows or (columns and column_scale is None) else None
    if rows and codes is not None:
        row_major.view(torch.uint8).copy_(codes)
    if columns:
        if column_scale is not None:
            codes = narrow(column_scale)
        assert codes is not None
        column_major.view(torch.uint8).copy_(codes.t())
    if measured:
        sums.copy_(cast_sums(tensor, dtype, scale))
    return row_major, column_major, sums


def outputs(
    tensor: Tensor, dtype: torch.dtype, rows: bool, columns: bool, alignment: int, measured: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What is written to, not yet filled."""
    height, width = (padded(size, alignment) for size in tensor.shape)
    return (
        tensor.new_empty((height, width) if rows else (0, 0), dtype=dtype),
        tensor.new_empty((width, height) if columns else (0, 0), dtype=dtype),
        tensor.new_empty(len(SUMS) if measured else 0, dtype=torch.float64),
    )


def _fake(tensor: Tensor, scale: Tensor, dtype: torch.dtype, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return outputs(tensor, dtype, *options)


_LIBRARY.impl("fp8_cast", _run, "CompositeExplicitAutograd")
torch.library.register_fake("lightning_unitscale::fp8_cast", _fake, lib=_LIBRARY)


def padded(size: int, alignment: int) -> int:
    """The next multiple."""
    return -(-size // alignment) * alignment


# ---------------------------------------------------------------------------------------------------------------------
# Which of the two
# ---------------------------------------------------------------------------------------------------------------------


@cache
def _has_kernel(device: torch.device) -> bool:
    """Whether the kernel runs there; a CUDA device without it gets a warning, once."""
    if device.type == "cpu":  # Triton's interpreter, for tests
        return environ.get("TRITON_INTERPRET") == "1" and triton_problem() == ""
    if device.type != "cuda":
        return False
    problem = triton_problem()
    if problem:
        warn_user(
            f"unit scaling: {problem}, so casts to FP8 run as several operations of torch, with the same values and "
            "about twice the memory traffic. pip install 'lightning-unitscale[cuda]' brings the fused kernel."
        )
    return not problem


@cache
def triton_problem() -> str:
    """Why Triton can't be used; empty if it can."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "Triton is not installed"
    oldest = ".".join(map(str, OLDEST_TRITON))
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {found} is older than {oldest}"
    return ""
