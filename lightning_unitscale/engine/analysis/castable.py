"""Which matmuls can have their operands cast, decided from the recorded calls, the same on every device."""

from __future__ import annotations

import torch

from lightning_unitscale.engine.record.trace import Call, Value
from lightning_unitscale.errors import UncastableError
from lightning_unitscale.formats import FORMATS
from lightning_unitscale.ops import MATMULS
from lightning_unitscale.ops.fp8_cast import padded
from lightning_unitscale.ops.multiply import ALIGNMENT
from lightning_unitscale.ops.products import MatrixProducts

MOST_PADDING = 1.25  # what FP8's multiples of 16 may add to a weight


def reason_not_to_cast(call: Call, format: str) -> str:
    """Why the operands of a matmul-like call stay in the compute dtype; empty if they can be cast."""
    op = MATMULS[call.name]
    if op.uncastable:
        return op.uncastable
    operands = op.cast_operands(call, lambda v: isinstance(v, Value) and bool(v.parameters))
    if operands is None:
        return "its operands are not one activation and one weight"
    x, weight = operands
    if x.is_complex or weight.is_complex:
        return "complex numbers, which no narrow format has"
    try:
        products = op.products(call, x, weight)
    except UncastableError as error:
        return str(error)
    narrow = FORMATS[format]
    if narrow.has_blocks and products.no_blocks:
        return f"{format} has blocks along what a product sums over: {products.no_blocks}"
    if torch.float8_e4m3fn == narrow.x and isinstance(products, MatrixProducts):
        rows, columns = weight.shape
        cost = padded(rows, ALIGNMENT) * padded(columns, ALIGNMENT) / (rows * columns)
        if cost > MOST_PADDING:
            return f"padding {rows} x {columns} to multiples of 16 would cost {cost - 1:.0%} more than it saves"
    return ""


def row_sizes(call: Call, format: str) -> list[int]:
    """Numbers of outputs and inputs of a castable call whose rows are to have scales of their own; else empty."""
    op = MATMULS[call.name]
    operands = op.cast_operands(call, lambda v: isinstance(v, Value) and bool(v.parameters))
    if operands is None or not FORMATS[format].by_rows or not isinstance(op.products(call, *operands), MatrixProducts):
        return []
    sizes = operands[1].shape
    return [sizes[op.output_dim], sizes[1 - op.output_dim]]


def reason_to_upcast(call: Call, format: str) -> str:
    """Why the products of a castable call are made of upcast operands on every device; empty if FP8 is multiplied."""
    operands = MATMULS[call.name].cast_operands(call, lambda v: isinstance(v, Value) and bool(v.parameters))
    if operands is None or torch.float8_e4m3fn != FORMATS[format].x:
        return ""
    return MATMULS[call.name].products(call, *operands).upcast
