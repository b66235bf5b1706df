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
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_unitscale.engine.checks.gradients import as_real, gradients_of, rehearsed_losses
from lightning_unitscale.engine.record.rehearsal import Rehearsal

if TYPE_CHECKING:
    import pytorch_lightning as pl

Average = Callable[[Tensor], Tensor]  # over all processes
Result = TypeVar("Result")
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
    average: Average = lambda tensor: tensor,
) -> FirstStep:
    """Measure one step of the model as it is now.

    Args:
        step: runs the step's forward pass and returns its loss; with several losses their sum is looked at.
        rates: by name of the weights to move, factor on the learning rate of each.
        average: over all processes, each of which takes the step on its own rows: gradients are those of the global
            batch, as the optimizer will have them.

    Raises:
        RuntimeError: the step failed, on this process or another.
    """
    named = {name: p for name, p in module.named_parameters() if name in rates and p.requires_grad}
    if not named:
        return FirstStep({}, {}, 0.0)
    device = next(iter(named.values())).device

    def taken() -> tuple[Tensor, list[Tensor]]:
        with rehearsed_losses(module, step, trainer, casts=False) as losses:
            found = gradients_of(losses, list(named.values())) if losses else []
            gradients = zip(named.values(), found, strict=True) if found else ()
            return _total(losses), [torch.zeros_like(p) if g is None else g for p, g in gradients]

    def tried() -> Tensor:
        with _moved(moved), rehearsed_losses(module, step, trainer, casts=False) as losses:
            return _total(losses)

    mean_loss, local = _on_all_processes(taken, average, device)
    loss = float(average(mean_loss))
    gradients = {name: average(g) for name, g in zip(named, local, strict=False)}
    moves = {name: float(as_real(g).float().abs().sum()) for name, g in gradients.items()}
    squares = {name: float(as_real(g).float().square().sum()) for name, g in gradients.items()}
    predicted = sum(rates[name] * move for name, move in moves.items())
    if not predicted or not isfinite(predicted) or not loss:
        return FirstStep(moves, squares, 0.0)
    length = TRIAL * abs(loss) / predicted
    moved = {named[name]: (g, length * rates[name]) for name, g in gradients.items()}
    fall = loss - float(average(_on_all_processes(tried, average, device)))
    return FirstStep(moves, squares, 1 - fall / (length * predicted) if isfinite(fall) else inf)


def _on_all_processes(run: Callable[[], Result], average: Average, device: torch.device) -> Result:
    """Its result; where it fails on one process it fails on all, so that none waits for another."""
    results, problem = [], ""
    try:
        results.append(run())
    except Exception as error:  # a model's own code may object to anything: a backward pass of its own, other values
        problem = f"{type(error).__name__}: {str(error)[:200]}"
    if float(average(torch.tensor(float(bool(problem)), device=device))):
        raise RuntimeError(problem or "it failed in another process")
    return results[0]


def _total(losses: list[Tensor]) -> Tensor:
    return torch.stack([loss.detach().double().reshape(()) for loss in losses] or [torch.zeros(())]).sum()


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
