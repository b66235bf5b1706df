"""One static loss scale for gradients that travel in FP16.

Where parameters and activations are FP16 (`Trainer(precision="16-true")`), the gradient of a mean loss over N tokens
starts at about 1/N and falls below FP16's smallest number, 2^-24, in the deeper layers. The backward pass therefore
starts from a power of two instead of 1,

    2^k · largest gradient of any matmul's output ∈ (2^7, 2^8]      2^8 below FP16's largest number, 2^22 above its
                                                                    smallest one with full precision

found on the first batch, and each parameter's gradient is divided by it before it reaches `.grad`: before it is
accumulated, reduced over processes, clipped, logged. There is no scaler state and no search. Should a gradient become
infinite after all, the step is left out with a warning that says so, and the scale is lowered for good.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from math import floor, isfinite, log2
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_unitscale.engine.checks.gradients import rehearsed_gradients
from lightning_unitscale.engine.record.rehearsal import Rehearsal
from lightning_unitscale.engine.runtime.observer import OperandObserver
from lightning_unitscale.engine.runtime.operand_statistics import Accumulator
from lightning_unitscale.warn_user import warn_user

if TYPE_CHECKING:
    import pytorch_lightning as pl

TARGET = 8  # the exponent that the largest gradient gets
LARGEST = 15  # the largest exponent that FP16 has, which a loss in FP16 passes on
_STEP_DOWN = 4  # octaves, after an overflow
_TRIES = 5


class LossScale:
    """Scales the backward pass of a module's losses, and takes the scale out of its parameters' gradients.

    Args:
        module: its trainable parameters get a hook, until `remove` is called.
        scale: a power of two.
    """

    def __init__(self, module: nn.Module, scale: float) -> None:
        self.scale = scale
        self._active = False
        self._names = {parameter: name for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._handles = [parameter.register_hook(self._taken_out) for parameter in self._names]

    @contextmanager
    def seeded(self, loss: Tensor) -> Any:
        """Inside, `backward` of the yielded loss, which has the same value, gives true gradients."""
        self._active = True
        try:
            yield _SeededGradient.apply(loss, self.scale)  # type: ignore[no-untyped-call]  # torch has no types here
        finally:
            self._active = False

    def _taken_out(self, gradient: Tensor) -> Tensor | None:
        return gradient / self.scale if self._active else None

    def leave_out_overflow(self, optimizer: Optimizer, step: int) -> None:
        """If a gradient is not finite, drop the optimizer's gradients, so that its step changes nothing, and say so."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters or bool(torch.stack([p.grad.isfinite().all() for p in parameters]).all()):
            return
        names = [self._names.get(p, "?") for p in parameters if not bool(p.grad.isfinite().all())]
        lower = self.scale / 2**_STEP_DOWN
        warn_user(
            f"unit scaling: step {step} is left out: {len(names)} gradients are NaN or infinite "
            f"({', '.join(names[:3])}). The loss scale is lowered from 2^{log2(self.scale):.0f} to "
            f"2^{log2(lower):.0f}. If this goes on, the loss itself is not finite."
        )
        self.scale = lower
        for parameter in parameters:
            parameter.grad = None

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


class _SeededGradient(torch.autograd.Function):
    """The same value; its gradient times a constant."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.scale, None


def needs_loss_scale(module: nn.Module) -> bool:
    """Whether gradients travel in FP16: whether a trainable parameter is FP16."""
    return any(p.dtype == torch.float16 and p.requires_grad for p in module.parameters())


def find_loss_scale(module: nn.Module, step: Callable[[Rehearsal], Any], trainer: pl.Trainer | None = None) -> float:
    """The power of two for this step's gradients; nothing the step does is kept."""
    exponent = 0
    for _ in range(_TRIES):
        observer = OperandObserver(
            module, lambda use, operand: Accumulator(torch.float16) if operand == "gradient" else None
        )
        rehearsed_gradients(module, step, trainer, observer=observer, seed=2.0**exponent)
        seen = [a["gradient"].result() for a in observer.found.values() if "gradient" in a]
        largest = max((statistics.largest for statistics in seen if statistics is not None), default=0.0)
        if any(statistics is not None and statistics.non_finite for statistics in seen):
            exponent -= TARGET
        elif largest < 2.0**-10 and exponent < LARGEST:  # too close to FP16's smallest numbers to be exact
            exponent = min(exponent + 10, LARGEST)
        elif largest and isfinite(largest):
            return 2.0 ** min(exponent + TARGET - 1 - floor(log2(largest)), LARGEST)
        else:
            break
    return 2.0**exponent
