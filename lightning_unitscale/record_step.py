"""One step of a model, rehearsed and written down: what every plan begins with, and what it is checked by."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_unitscale.engine.analysis.loss_path import used_parameters
from lightning_unitscale.engine.checks.gradients import differentiable_losses
from lightning_unitscale.engine.checks.gradients_taken import GradientsTaken
from lightning_unitscale.engine.plan.siblings import differ_in_a_number
from lightning_unitscale.engine.record.autograd_functions import reentrant_checkpoints_opened
from lightning_unitscale.engine.record.random_draws import draw_anew, random_state
from lightning_unitscale.engine.record.recorder import loss_tensors, recording
from lightning_unitscale.engine.record.rehearsal import Rehearsal, rehearsal
from lightning_unitscale.engine.record.trace import Trace
from lightning_unitscale.errors import NoLossError, UnitScalingError

if TYPE_CHECKING:
    import pytorch_lightning as pl

MORE_DRAWS = 3
Step = Callable[[Rehearsal], Any]  # runs one step's forward pass and returns its loss, or a dict with it


def record_draws(
    module: nn.Module,
    step: Step,
    trainer: pl.Trainer | None,
    agree: Callable[[dict[str, Any]], dict[str, Any]],
    taken: GradientsTaken | None = None,
) -> tuple[Trace, Trace]:
    """The step as its own random numbers have it, and as it ran most of the model (stochastic depth, LayerDrop).

    Other numbers are drawn, a few times, only where a step that draws any leaves parameters unused that no sibling
    speaks for. Gradients are taken of the first.
    """
    first = record(module, step, trainer, taken=taken)
    traces = [first]
    while len(traces) <= MORE_DRAWS and agree({"again": first.drew and bool(_unheard_of(traces[-1]))})["again"]:
        traces.append(record(module, step, trainer, draw=len(traces)))
    return first, max(traces, key=lambda trace: len(used_parameters(trace)))


def _unheard_of(trace: Trace) -> set[str]:
    """Trainable parameters that the step did not use, nor any sibling of theirs."""
    used = used_parameters(trace)
    shapes = {name: facts.shape for name, facts in trace.facts.items()}
    return {
        name
        for name, facts in trace.facts.items()
        if facts.trainable
        and name not in used
        and not any(shapes[other] == facts.shape and differ_in_a_number(name, other) for other in used)
    }


def record(
    module: nn.Module,
    step: Step,
    trainer: pl.Trainer | None = None,
    draw: int = 0,
    *,
    taken: GradientsTaken | None = None,
    may_overflow: bool = False,
) -> Trace:
    """Run the step without leaving a trace in the model, and return what it did.

    Args:
        draw: 0 for the random numbers that are next, other numbers for others.
        taken: takes the gradients of its losses too.
        may_overflow: whether a loss that is not finite is none of this function's business.

    Raises:
        NoLossError: there is none.
        UnitScalingError: the loss is not one number, or not finite.
    """
    taken = taken or GradientsTaken(module)
    with (
        rehearsal(module, trainer) as rehearsed,
        torch.enable_grad(),
        reentrant_checkpoints_opened(),
        taken.watching(),
    ):
        with recording(module) as recorder:
            if draw:
                draw_anew(draw)
            before = random_state()
            output = step(rehearsed)
            trace = recorder.finish(output, rehearsed.losses)
        trace.drew = random_state() != before
        taken.take(differentiable_losses(output, rehearsed))
        trace.copies = [(value, rehearsed.original(tensor)) for value, tensor in trace.copies]
        backwards = bool(rehearsed.losses)
    if not trace.loss_numbers:
        raise NoLossError(
            f"the rehearsed step of {type(module).__name__} gave no loss: return a tensor or a dict with 'loss', "
            "or call backward()."
        )
    shapes = [tuple(loss.shape) for loss in loss_tensors(output, []) if loss.numel() != 1]
    if shapes and not backwards:
        raise UnitScalingError(
            f"the rehearsed step of {type(module).__name__} returned a tensor of shape {shapes[0]} where its loss, one "
            "number, is wanted."
        )
    if not may_overflow and not all(isfinite(number) for number in trace.loss_numbers):
        raise UnitScalingError(
            f"the loss of the rehearsed step of {type(module).__name__} is {trace.loss_numbers[0]}: the first batch or "
            "the initial weights hold NaN or infinity, or the loss overflows. Mend that first; nothing was changed."
        )
    return trace
