"""The product of an activation and a weight in narrow formats, with both its gradients.

    x̂ = cast(x · sx)     ŵ = cast(w · sw)     ĝ = cast(g · sg)

    y  = (a/sx) · (1/sw) · x̂ ∘ ŵ
    gx = (a/sg) · (1/sw) · ĝ ∘ ŵ
    gw = (a/sg) · (1/sx) · ĝ ∘ x̂

where ∘ is a bilinear product or one of its adjoints (see `products`) and `a` the factor that unit scaling has for the
site. The scales s are powers of two in 0-dim tensors (see `formats`), so a new value is no new graph. What is saved for
the backward pass are the cast operands, in the one layout that it reads: a quarter of float32's memory in FP8. The
casts belong to the Function, so autograd never casts a gradient by itself, as it does for `tensor.to(float8)`.

With rows that have scales of their own (`format="fp8_rowwise"`), s is a vector along a dimension that the product
keeps, since one along what is summed over could not be taken out again: of ŵ its rows in y and its columns in gx, of ĝ
and x̂ their columns in gw. Tokens come and go, so x in y and g in gx have one scale.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.formats import Format
from lightning_unitscale.ops.autocast import autocast_dtype
from lightning_unitscale.ops.cast_for_products import CastOperand, cast_for_products
from lightning_unitscale.ops.multiply import Cast
from lightning_unitscale.ops.products import Products


class Scales(NamedTuple):
    """What the operands of one site are multiplied by; float32 tensors on the model's device.

    0-dim, and the same for both products of an operand. With rows that have scales of their own (m, 1), along the
    operand's rows, or (1, n), along its columns; what is said of columns is for the product that sums over rows.
    """

    x: Tensor  # sx
    weight: Tensor  # sw
    gradient: Tensor  # sg
    factor_over_x: Tensor  # a / sx
    one_over_x: Tensor
    one_over_weight: Tensor
    factor_over_gradient: Tensor  # a / sg
    x_columns: Tensor | None = None  # `one_over_x` is of these
    weight_columns: Tensor | None = None
    gradient_columns: Tensor | None = None
    one_over_weight_columns: Tensor | None = None
    factor_over_gradient_columns: Tensor | None = None

    def of(self, operand: str) -> tuple[Tensor, Tensor]:
        """Of "x", "weight" or "gradient": for its first product and for its second."""
        first: Tensor = getattr(self, operand)
        columns: Tensor | None = getattr(self, f"{operand}_columns")
        return first, first if columns is None else columns

    def to(self, device: torch.device | str) -> Scales:
        """The same on another device."""
        return Scales(*(scale if scale is None else scale.to(device) for scale in self))  # type: ignore[arg-type]  # some are optional


class CastProduct(torch.autograd.Function):
    """The three products above."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        narrow_weight: CastOperand | None,
        products: Products,
        format: Format,
        dtype: torch.dtype,
        *scales: Tensor | None,
    ) -> Tensor:
        s, (needs_x, needs_weight) = Scales(*scales), ctx.needs_input_grad[:2]  # type: ignore[arg-type]  # some are optional
        narrow_x = cast_for_products(x, "x", format, s.of("x"), products, backward=needs_weight)
        if narrow_weight is None:
            narrow_weight = cast_for_products(weight, "weight", format, s.of("weight"), products, backward=needs_x)
        x_for_weight = narrow_x.second if needs_weight else None
        weight_for_x = narrow_weight.second if needs_x else None
        ctx.save_for_backward(x_for_weight, weight_for_x, *scales)
        ctx.products, ctx.format, ctx.like = products, format, (x.shape, weight.shape, x.dtype, weight.dtype)
        return products.forward(
            Cast(narrow_x.first, s.factor_over_x, x.shape),
            Cast(narrow_weight.first, s.one_over_weight, weight.shape),
            dtype,
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        narrow_x, narrow_weight, *scales = ctx.saved_tensors
        s, products = Scales(*scales), ctx.products
        x_shape, weight_shape, x_dtype, weight_dtype = ctx.like
        (gradient,), (needs_x, needs_weight) = gradients, ctx.needs_input_grad[:2]
        g = cast_for_products(
            gradient, "gradient", ctx.format, s.of("gradient"), products, forward=needs_x, backward=needs_weight
        )
        gx = gw = None
        if needs_x:
            over_weight = s.one_over_weight if s.one_over_weight_columns is None else s.one_over_weight_columns
            weight = Cast(narrow_weight, over_weight, weight_shape)
            gx = products.grad_x(Cast(g.first, s.factor_over_gradient, gradient.shape), weight, x_shape, x_dtype)
        if needs_weight:
            columns = s.factor_over_gradient_columns
            over_gradient = s.factor_over_gradient if columns is None else columns
            x = Cast(narrow_x, s.one_over_x, x_shape)
            gw = products.grad_weight(Cast(g.second, over_gradient, gradient.shape), x, weight_shape, weight_dtype)
        return (gx, gw, *[None] * (4 + len(scales)))


def refuse_second_derivative() -> None:
    """To be called in a backward pass whose result would lack a graph of its own.

    Raises:
        UnitScalingError: it is asked for one.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise UnitScalingError(
            "create_graph=True asks for the gradient of a gradient, which operands cast to a narrow format do not "
            "have. Leave the modules it passes through in the compute dtype: overrides={glob: {'format': None}}, or "
            "'attention_format' where that was given."
        )


def cast_product(
    x: Tensor,
    weight: Tensor,
    products: Products,
    format: Format,
    scales: Scales,
    narrow_weight: CastOperand | None = None,
) -> Tensor:
    """`x · weight` with cast operands, in the dtype that autocast or x gives.

    Args:
        x, weight: of any floating-point dtype.
        narrow_weight: the weight as it was cast before, to save casting it again.
    """
    arguments, dtype = (x, weight, narrow_weight, products, format), autocast_dtype(x.device)
    y: Tensor
    if dtype is None or x.dtype == torch.float64:  # which autocast leaves alone
        y = CastProduct.apply(*arguments, x.dtype, *scales)  # type: ignore[no-untyped-call]  # torch has no types here
    else:
        with torch.autocast(x.device.type, enabled=False):
            y = CastProduct.apply(*arguments, dtype, *scales)  # type: ignore[no-untyped-call]  # torch has no types here
    return y
