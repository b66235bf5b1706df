"""Gradients as an optimizer is to see them: divided by their own scale, or those of what the function sees.

    the update uses g / γ        γ = max|g| / √d        d elements; where the scheme wants it
    the update uses g / r        r = multiplier/stored, a constant; where the optimizer's family wants it

The one exception to "what is in `.grad` is the true gradient", and a narrow one: `.grad` holds the other only while
the optimizer computes its update. Before and after, and inside a closure, it is the true gradient, the same tensor:
accumulation adds up true gradients, all-reduce averages them, user code, clipping and loggers see them. γ is that of
the whole gradient, after all of that, so processes that hold the same gradient divide by the same number. A constant
that all of a gradient is multiplied by is divided out again: clipping by norm and loss scales make no difference to the
update.

A gradient that is all zero is left as it is. No number leaves the device. r is 1 for all that is stored as the function
sees it, which is nearly everything in folded storage.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_unitscale.engine.record.spread_tensors import over_parts, part_of
from lightning_unitscale.ops.max_scale import max_scale


class SeenGradients:
    """The gradients of one optimizer, while others stand in for them.

    Args:
        factors: what each gradient is to be multiplied by, None for 1/γ; in the same order in every process, for the
            largest element of a sharded one is found by all of them together.
    """

    def __init__(self, factors: Mapping[Tensor, float | None]) -> None:
        self._factors = factors
        self._true: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, its true gradient, what stands in for it

    def __bool__(self) -> bool:
        return bool(self._factors)

    def show(self, optimizer: Optimizer) -> None:
        """Put what is to be seen in the place of each gradient; where it stands already it stays."""
        if self._true:
            return
        # A GradScaler hands fused optimizers gradients that are still multiplied, and they divide by its scale.
        loss_scale = getattr(optimizer, "grad_scale", None)
        for parameter, factor in self._factors.items():
            if parameter.grad is not None and parameter.grad.numel():
                true = parameter.grad
                parameter.grad = divided(true, loss_scale) if factor is None else true.detach() * factor
                self._true.append((parameter, true, parameter.grad))

    def restore(self) -> None:
        """Put the true gradients back where those that stand in for them still are."""
        for parameter, true, stand_in in self._true:
            if parameter.grad is stand_in:
                parameter.grad = true
        self._true.clear()


@torch.no_grad()
def divided(gradient: Tensor, loss_scale: Tensor | None = None) -> Tensor:
    """g / γ; times the loss scale, if the optimizer is going to divide by it."""
    if isinstance(gradient, DTensor):  # sharded: γ is the whole one's
        part = part_of(gradient)
        largest = over_parts(part.abs().amax() if part.numel() else part.new_zeros(()), gradient, ReduceOp.MAX)
        scaled = gradient / torch.where(largest == 0, 1.0, largest / gradient.numel() ** 0.5)
    elif not gradient.is_sparse:
        scaled = gradient / max_scale(gradient)
    else:
        gradient = gradient.coalesce()
        values = gradient.values()
        if values.numel():
            values = values / (max_scale(values) * (values.numel() / gradient.numel()) ** 0.5)
        scaled = torch.sparse_coo_tensor(gradient.indices(), values, gradient.shape, is_coalesced=True)
    return scaled if loss_scale is None else scaled * loss_scale.to(scaled.device)
