"""The workhorse of scaled matrix products,

    y  = a · x Wᵀ + b · bias            x: (n, in)   W: (out, in)   y: (n, out)
    gx = a · g W
    gW = a · gᵀ x
    gb = b · Σ g

with the constants inside the three products (`addmm(alpha=a)`), so that scaling costs no pass over memory, and
neither a scaled copy of the weight nor of the activations is kept (Unit Scaling, arXiv 2303.11257, section 4).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_unitscale.ops.autocast import autocast_dtype


class ScaledProduct(torch.autograd.Function):
    """`a · x Wᵀ + b · bias` for 2-D x; backward is made of differentiable operations (gradient penalties work)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: float, b: float) -> Tensor:
        return _product(x, weight.t(), a) if bias is None else torch.addmm(bias, x, weight.t(), alpha=a, beta=b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.a, ctx.b = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (g,) = grads
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        return (
            _product(g, weight, ctx.a) if needs_x else None,
            _product(g.t(), x, ctx.a) if needs_weight else None,
            g.sum(0) * ctx.b if needs_bias else None,
            None,
            None,
        )


class ProductWithTangents(ScaledProduct):
    """The same with forward-mode derivatives, `torch.func.jvp`, which the compiler can't trace a Function with."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ScaledProduct.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(
        ctx: Any, x_tangent: Tensor | None, weight_tangent: Tensor | None, bias_tangent: Tensor | None, *_: Any
    ) -> Tensor:
        x, weight = ctx.saved_tensors
        terms = [
            None if x_tangent is None else _product(x_tangent, weight.t(), ctx.a),
            None if weight_tangent is None else _product(x, weight_tangent.t(), ctx.a),
            None if bias_tangent is None else (ctx.b * bias_tangent).expand(len(x), -1),
        ]
        return torch.stack([term for term in terms if term is not None]).sum(0)


# `Function.apply` asks for this signature at every call, and working it out costs as much as a small product.
vars(ScaledProduct.forward)["__signature__"] = inspect.signature(ScaledProduct.forward)


def _product(left: Tensor, right: Tensor, a: float) -> Tensor:
    # Zeros, not empty: with `beta=0` it is not read, but torch.func's rule for batches multiplies it by 0, NaN too.
    return torch.addmm(left.new_zeros(()), left, right, alpha=a, beta=0)


def scaled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: float, b: float) -> Tensor:
    """`a · x Wᵀ + b · bias`; x: (*, in), weight: (out, in), bias: (out,), result: (*, out)."""
    if x.is_complex():  # whose gradients have conjugates in them
        unbiased = F.linear(x, weight) * a
        return unbiased if bias is None else unbiased + bias * b
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        # Cast first: inside the Function autocast would give the backward pass operands of two dtypes.
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return scaled_linear(x, weight, bias, a, b)
    product = ScaledProduct if torch.compiler.is_compiling() else ProductWithTangents
    y: Tensor = product.apply(x.reshape(-1, x.shape[-1]), weight, bias, a, b)  # type: ignore[no-untyped-call]  # torch has no types here
    return y.reshape(*x.shape[:-1], weight.shape[0])
