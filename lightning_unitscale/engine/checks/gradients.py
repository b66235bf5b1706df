"""Losses and gradients of a step that leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import backward as _backward  # by this name: a rehearsal shadows the other one

from lightning_unitscale.engine.record.autograd_functions import reentrant_checkpoints_allowed
from lightning_unitscale.engine.record.leaf_gradients import leaves_of
from lightning_unitscale.engine.record.recorder import loss_tensors
from lightning_unitscale.engine.record.rehearsal import Rehearsal, rehearsal
from lightning_unitscale.engine.record.spread_tensors import is_sharded, part_of
from lightning_unitscale.engine.runtime.install import casts_in_force
from lightning_unitscale.engine.runtime.observer import OperandObserver

if TYPE_CHECKING:
    import pytorch_lightning as pl

SAMPLES = 65_536  # elements of a gradient that are kept: enough to compare two, little beside the model


@contextmanager
def rehearsed_losses(
    module: nn.Module,
    step: Callable[[Rehearsal], Any],
    trainer: pl.Trainer | None = None,
    *,
    casts: bool = True,
    observer: OperandObserver | None = None,
) -> Iterator[list[Tensor]]:
    """The sum of each loss of the step that can be differentiated, inside the rehearsal.

    Args:
        casts: whether operands are cast.
        observer: watches the step, forward and backward.
    """
    with rehearsal(module, trainer) as run, torch.enable_grad():
        if not casts:
            for cast in casts_in_force(module).values():  # copies, that the rehearsal works on
                cast.scales = None
        with reentrant_checkpoints_allowed(), observer or nullcontext():
            yield differentiable_losses(step(run), run)


def differentiable_losses(output: Any, run: Rehearsal) -> list[Tensor]:
    """The sum of each loss that can be differentiated, of a step that gave this output in a rehearsal."""
    losses = {id(loss): loss for loss in loss_tensors(output, run.losses)}
    return [loss.sum() for loss in losses.values() if loss.requires_grad]


def rehearsed_gradients(
    module: nn.Module,
    step: Callable[[Rehearsal], Any],
    trainer: pl.Trainer | None = None,
    *,
    casts: bool = True,
    observer: OperandObserver | None = None,
    seed: float = 1.0,
) -> dict[str, Tensor]:
    """Samples of each parameter's gradient, in float64; parameters without one are left out.

    Args:
        casts, observer: as for `rehearsed_losses`.
        seed: what the backward pass starts from.
    """
    with rehearsed_losses(module, step, trainer, casts=casts, observer=observer) as losses:
        return samples_of(named_gradients(module, losses, seed))


def named_gradients(
    module: nn.Module, losses: list[Tensor], seed: float = 1.0, *, keep_graph: bool = False
) -> dict[str, Tensor]:
    """The gradient of the losses' sum, by parameter; those that it does not depend on are left out.

    Inside a rehearsal, which puts `.grad` back. There code leaves gradients that the graph does not know: reversible
    networks and some checkpoints, which call `backward` in a Function's backward pass. That is run if anything before
    it in the graph is asked for, so inputs are.
    """
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not losses or not named:
        return {}
    seeds = [torch.full_like(loss, seed) for loss in losses]
    if is_sharded(module):
        _backward(losses, seeds, retain_graph=keep_graph)
        gradients = _left_behind(module)
        for gathered in named.values():  # FSDP2 would add to what is left there, as it is by hooks like the observer's
            gathered.grad = None
        return gradients
    for parameter in named.values():
        parameter.grad = None
    known = {id(parameter) for parameter in named.values()}
    inputs = [leaf for leaf in leaves_of(losses) if id(leaf) not in known]
    found = torch.autograd.grad(losses, [*named.values(), *inputs], seeds, retain_graph=keep_graph, allow_unused=True)
    gradients = _left_behind(module)
    for name, gradient in zip(named, found, strict=False):
        if gradient is not None:
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
    return gradients


def _left_behind(module: nn.Module) -> dict[str, Tensor]:
    """What is in `.grad`, taken out.

    Of FSDP2 it is asked after a backward pass: what stands in a parameter's place before is gathered, and has none.
    """
    left = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    for parameter in module.parameters():
        parameter.grad = None
    return left


def samples_of(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Evenly spaced elements of each, in float64."""
    return {
        name: as_real(part_of(gradient)).reshape(-1)[:: spacing(gradient)].double()
        for name, gradient in gradients.items()
        if gradient.numel()
    }


def as_real(tensor: Tensor) -> Tensor:
    """The same numbers, dense, real, of a dimension or more: complex ones as pairs, what a sparse one left out as 0."""
    tensor = torch.atleast_1d(tensor.to_dense() if tensor.layout is not torch.strided else tensor)
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def spacing(tensor: Tensor) -> int:
    """How far apart the elements are that are kept of a tensor."""
    return -(-tensor.numel() * (2 if tensor.is_complex() else 1) // SAMPLES)
