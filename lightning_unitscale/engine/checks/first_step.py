"""What one optimizer step would do to the loss, measured on the recorded batch without taking it.

The first step of an Adam-like optimizer moves each element by its learning rate against the sign of its gradient, one
of SGD by its rate times the gradient. To first order the loss then falls by

    Adam   Σ lr · |g|        SGD   Σ lr · g²

These sums, weight by weight, are what a learning rate *does*, whatever scale the weights are stored at. How far they
can be trusted shows a trial: all weights moved along the signs of their gradients, by their rates times one s, so that
the loss should fall by `TRIAL` of itself. The share of it that does not come true is the curvature's, in a step of s

    1 - (true fall) / (predicted fall)  ≈  ½ s · dᵀHd / Σ lr·|g|,        d = lr · sign(g)

It takes one backward and one more forward pass, and leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_unitscale.engine.checks.gradients import as_real, rehearsed_losses
from lightning_unitscale.engine.record.rehearsal import Rehearsal

TRIAL = 0.3  # of the loss: far enough to feel the curvature that a run meets, near enough for it to be one number


@dataclass(frozen=True)
class FirstStep:
    """One step of a model, to first order and beyond.

    Attributes:
        moves: Σ|g| of each weight.
        squares: Σg² of each weight.
        lost: the share of the predicted fall of the loss that the trial does not bring; above 1 the loss rises,
            infinite where it overflows.
    """

    moves: dict[str, float]
    squares: dict[str, float]
    lost: float


def measure_first_step(
    module: nn.Module,
    step: Callable[[Rehearsal], Any],
    rates: Mapping[str, float],
    trainer: pl.Trainer | None = None,
) -> FirstStep:
    """Measure one step of the model as it is now.

    Args:
        step: runs the step's forward pass and returns its loss; with several losses their sum is looked at.
        rates: by name of the weights to move, factor on the learning rate of each.
    """
    named = {name: p for name, p in module.named_parameters() if name in rates and p.requires_grad}
    with rehearsed_losses(module, step, trainer, casts=False) as losses:
        loss = _total(losses)
        found = torch.autograd.grad(losses, list(named.values()), allow_unused=True) if losses and named else ()
    gradients = {name: g for name, g in zip(named, found, strict=True) if g is not None and g.numel()} if found else {}
    moves = {name: float(as_real(g).float().abs().sum()) for name, g in gradients.items()}
    squares = {name: float(as_real(g).float().square().sum()) for name, g in gradients.items()}
    predicted = sum(rates[name] * move for name, move in moves.items())
    if not predicted or not isfinite(predicted) or not loss:
        return FirstStep(moves, squares, 0.0)
    length = TRIAL * abs(loss) / predicted
    with (
        _moved({named[name]: (g, length * rates[name]) for name, g in gradients.items()}),
        rehearsed_losses(module, step, trainer, casts=False) as losses,
    ):
        fall = loss - _total(losses)
    return FirstStep(moves, squares, 1 - fall / (length * predicted) if isfinite(fall) else inf)


def _total(losses: list[Tensor]) -> float:
    return sum(float(loss.detach()) for loss in losses)


@contextmanager
def _moved(steps: Mapping[nn.Parameter, tuple[Tensor, float]]) -> Iterator[None]:
    """Inside, each parameter is one step against the sign of its gradient; afterwards what it was, bit for bit."""
    before = [(as_real(parameter.data), as_real(parameter.data).clone()) for parameter in steps]
    try:
        for (values, _), (gradient, length) in zip(before, steps.values(), strict=True):
            values.sub_(as_real(gradient).sign().to(values.dtype), alpha=length)
        yield
    finally:
        for values, old in before:
            values.copy_(old)
