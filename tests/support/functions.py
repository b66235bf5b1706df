"""Hand-written `torch.autograd.Function`s, of the kinds that training code brings along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / 2**0.5)) + x * torch.exp(-0.5 * x**2) / (2 * torch.pi) ** 0.5


class Linear(torch.autograd.Function):
    """x wᵀ + b that saves its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        return gradient @ weight, flat.T @ x.flatten(0, -2), flat.sum(0) if ctx.needs_input_grad[2] else None


class LinearRelu(torch.autograd.Function):
    """relu(x wᵀ + b), which keeps the output instead of what comes before it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        output = F.relu(F.linear(x, weight, bias))
        ctx.save_for_backward(x, weight, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, output = ctx.saved_tensors
        gradient = gradient * (output > 0)
        flat = gradient.flatten(0, -2)
        return gradient @ weight, flat.T @ x.flatten(0, -2), flat.sum(0)


class Mlp(torch.autograd.Function):
    """Two linear layers around a GELU, run again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, up, up_bias, down, down_bias)
        return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        saved = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            x, up, up_bias, down, down_bias = saved
            return torch.autograd.grad(F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias), saved, gradient)


class LinearCrossEntropy(torch.autograd.Function):
    """Fused readout and loss that takes its gradients in the forward pass, as today's training kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = x @ weight.t()
        d = (logits.softmax(-1) - F.one_hot(target, len(weight))) / len(target)
        ctx.save_for_backward(d @ weight, d.t() @ x)
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        of_x, of_weight = ctx.saved_tensors
        return gradient * of_x, gradient * of_weight, None


class ChunkedCrossEntropy(torch.autograd.Function):
    """The same, some rows at a time, so that the logits never exist at once (Liger)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, chunks: int = 3) -> Tensor:
        of_x, of_weight, losses = torch.zeros_like(x), torch.zeros_like(weight), []
        size = -(-len(x) // chunks)
        for start in range(0, len(x), size):
            rows, aims = x[start : start + size], target[start : start + size]
            logits = rows @ weight.t()
            losses.append(F.cross_entropy(logits, aims, reduction="sum") / len(x))
            d = (logits.softmax(-1) - F.one_hot(aims, len(weight))) / len(x)
            of_x[start : start + size] = d @ weight
            of_weight += torch.mm(d.t(), rows)
        ctx.save_for_backward(of_x, of_weight)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        of_x, of_weight = ctx.saved_tensors
        return gradient * of_x, gradient * of_weight, None, None


class Gelu(torch.autograd.Function):
    """GELU that computes its slope in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * _gelu_slope(x)


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up that keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        return gradient * up * sigmoid * (1 + gate * (1 - sigmoid)), gradient * gate * sigmoid


class Alias(torch.autograd.Function):
    """Gives back what it was given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class View(Alias):
    """Gives back a view of what it was given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)


class Reversal(View):
    """Gradient reversal, as domain-adversarial training has it."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class GradientScale(View):
    """A smaller gradient."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 0.25 * gradient


class StraightThrough(torch.autograd.Function):
    """Rounding, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Rerun(torch.autograd.Function):
    """Checkpointing as diffusion models bring it along: parameters are inputs, modules run again in backward."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.x, ctx.parameters = run, x, parameters
        return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs = (ctx.x.detach().requires_grad_(), *ctx.parameters)
        with torch.enable_grad():
            return None, *torch.autograd.grad(ctx.run(inputs[0]), inputs, gradient, allow_unused=True)
