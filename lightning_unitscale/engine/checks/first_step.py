"""What one optimizer step would do to the loss, measured on the recorded batch without taking it.

The first step of an Adam-like optimizer moves each element by its learning rate against the sign of its gradient, one
of SGD by its rate times the gradient. To first order the loss then falls by

    Adam   Σ lr · |g|        SGD   Σ lr · g²

These sums, weight by weight, are what a learning rate *does*, whatever scale the weights are stored at. How far they
can be trusted shows a trial: all weights moved along the signs of their gradients, by their rates times one s, so that
the loss should fall by `TRIAL` of itself. The share of it that does not come true is the curvature's, in a step of s

    1 - (true fall) / (predicted fall)  ≈  ½ s · dᵀHd / Σ lr·|g|,        d = lr · sign(g)

It takes one more forward pass than the gradients did, and leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_unitscale.engine.checks.gradients import as_real, rehearsed_losses
from lightning_unitscale.engine.checks.gradients_taken import GradientsTaken, number_of, said
from lightning_unitscale.engine.record.rehearsal import Rehearsal
from lightning_unitscale.engine.record.spread_tensors import over_parts, part_of

if TYPE_CHECKING:
    import pytorch_lightning as pl

Average = Callable[[Tensor], Tensor]  # over all processes
Result = TypeVar("Result")
_ROW = 4096  # elements that are added up one after another: a norm of millions in one go is off by a thousandth
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
    taken: GradientsTaken,
    step: Callable[[Rehearsal], Any],
    rates: Mapping[str, float],
    trainer: pl.Trainer | None = None,
    average: Average = lambda tensor: tensor,
) -> FirstStep:
    """Measure one step of the model as it is now.

    Args:
        taken: the whole gradients of the model as it is now; they are given up here.
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

    def found() -> dict[str, Tensor]:
        return {name: taken.whole[name] if name in taken.whole else torch.zeros_like(p) for name, p in named.items()}

    def tried() -> Tensor:
        with _moved(moved), rehearsed_losses(module, step, trainer, casts=False) as losses:
            return total(number_of(loss) for loss in losses)

    def total(losses: Iterable[float]) -> Tensor:
        return torch.tensor(sum(losses), dtype=torch.float64, device=device)

    problem = taken.problem or ("" if taken.whole else "no loss depends on any parameter")
    local = _on_all_processes(found, average, device, problem)
    taken.whole.clear()
    loss = float(average(total(value for value, _ in taken.losses)))
    gradients = {
        name: g if isinstance(g, DTensor) else average(g)  # a spread one is of the global batch already
        for name, g in local.items()
    }
    moves = {name: _sum_of_powers(g, 1) for name, g in gradients.items()}
    squares = {name: _sum_of_powers(g, 2) for name, g in gradients.items()}
    predicted = sum(rates[name] * move for name, move in moves.items())
    if not predicted or not isfinite(predicted) or not loss:
        return FirstStep(moves, squares, 0.0)
    length = TRIAL * abs(loss) / predicted
    moved = {named[name]: (g, length * rates[name]) for name, g in gradients.items()}
    fall = loss - float(average(_on_all_processes(tried, average, device)))
    return FirstStep(moves, squares, 1 - fall / (length * predicted) if isfinite(fall) else inf)


def _on_all_processes(run: Callable[[], Result], average: Average, device: torch.device, problem: str = "") -> Result:
    """Its result, unless there is a problem; where one process has one all fail, so that none waits for another."""
    results = []
    try:
        if not problem:
            results.append(run())
    except Exception as error:  # a model's own code may object to anything: a backward pass of its own, other values
        problem = said(error)
    if float(average(torch.tensor(float(bool(problem)), device=device))):
        raise RuntimeError(problem or "it failed in another process")
    return results[0]


def _sum_of_powers(tensor: Tensor, power: int) -> float:
    """Σ|t|^power over all elements."""
    flat = as_real(part_of(tensor)).reshape(-1)
    rows = flat.numel() // _ROW
    pieces = (flat[: rows * _ROW].view(rows, _ROW), flat[rows * _ROW :].view(1, -1))
    dtype = torch.promote_types(flat.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(piece, power, dim=-1, dtype=dtype) for piece in pieces]
    return float(over_parts(torch.cat(norms).pow(power).sum(), tensor))


@contextmanager
def _moved(steps: Mapping[nn.Parameter, tuple[Tensor, float]]) -> Iterator[None]:
    """Inside, each parameter is one step against the sign of its gradient; afterwards what it was, bit for bit."""
    parts = [as_real(part_of(parameter.data)) for parameter in steps]
    before = [(values, values.clone()) for values in parts]
    scratch = {values.device: values.new_empty(0) for values in parts}  # new memory costs more than what is done in it
    try:
        for values, (gradient, length) in zip(parts, steps.values(), strict=True):
            signs = torch.sign(as_real(part_of(gradient)), out=scratch[values.device].resize_(0))
            values.sub_(signs, alpha=length)
        yield
    finally:
        for values, old in before:
            values.copy_(old)
