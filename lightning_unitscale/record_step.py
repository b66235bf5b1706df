"""One step of a model, rehearsed and written down: what every plan begins with, and what it is checked by."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from lightning_unitscale.engine.analysis.loss_path import used_parameters
from lightning_unitscale.engine.checks.gradients import differentiable_losses
from lightning_unitscale.engine.checks.gradients_taken import GradientsTaken
from lightning_unitscale.engine.plan.siblings import differ_in_a_number
from lightning_unitscale.engine.record.random_draws import draw_anew, random_state
from lightning_unitscale.engine.record.recorder import Recorder, loss_tensors, recording
from lightning_unitscale.engine.record.rehearsal import Rehearsal, rehearsal
from lightning_unitscale.engine.record.trace import Trace
from lightning_unitscale.errors import NoLossError, UnitScalingError

if TYPE_CHECKING:
    import pytorch_lightning as pl

MORE_DRAWS = 3
LATER_STEPS = 5  # that bring nothing new
LATER_EPOCHS = 3  # the last of them are of later epochs, for code that takes turns by those
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
    speaks for. What is then left may have its turn in a later step, or by another draw (the head of a task): so a few
    steps in a row are recorded as one. Gradients are taken of the first.
    """
    first = record(module, step, trainer, taken=taken)
    traces = [first]
    while len(traces) <= MORE_DRAWS and agree({"again": first.drew and bool(_unheard_of(traces[-1]))})["again"]:
        traces.append(record(module, step, trainer, draw=len(traces)))
    fullest = max(traces, key=lambda trace: len(used_parameters(trace)))
    if agree({"again": bool(_unheard_of(fullest))})["again"]:
        with suppress(Exception):  # what a step's code objects to where it is not the next one
            several = record(module, step, trainer, later_steps=True)
            fullest = several if used_parameters(several) > used_parameters(fullest) else fullest
    return first, fullest


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


def _run_later_steps(recorder: Recorder, rehearsed: Rehearsal, step: Step) -> None:
    """Run the steps after the one recorded, each as the next batch's and under other random numbers, on the same data.

    They end when nothing is left that no step used, or when a few have brought nothing new, the last of them as if each
    were of another epoch. As other processes may wait for a step, they are so many in all where there are others.
    """
    last, alone = LATER_STEPS, not distributed.is_initialized() or distributed.get_world_size() == 1
    while rehearsed.later < last + LATER_EPOCHS and (_unheard_of(recorder.trace) or not alone):
        used = used_parameters(recorder.trace)
        rehearsed.losses.clear()
        rehearsed.move_on(epochs=int(rehearsed.later >= last))
        draw_anew(rehearsed.later)
        recorder.finish(step(rehearsed), rehearsed.losses)
        if alone and used_parameters(recorder.trace) > used:
            last = rehearsed.later + LATER_STEPS


def record(
    module: nn.Module,
    step: Step,
    trainer: pl.Trainer | None = None,
    draw: int = 0,
    *,
    later_steps: bool = False,
    taken: GradientsTaken | None = None,
    may_overflow: bool = False,
) -> Trace:
    """Run the step without leaving a trace in the model, and return what it did.

    Args:
        draw: 0 for the random numbers that are next, other numbers for others.
        later_steps: record steps after it with it, as one, see `_run_later_steps`.
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
        taken.watching(),
    ):
        with recording(module) as recorder:
            if draw:
                draw_anew(draw)
            before = random_state()
            output = step(rehearsed)
            trace = recorder.finish(output, rehearsed.losses)
            if later_steps:
                _run_later_steps(recorder, rehearsed, step)
        trace.drew = random_state() != before
        if trace.transformed:  # torch can crash where a backward pass through its tangents meets a dispatch mode
            taken.problem = "torch.func ran part of the step"
        elif not trace.reentrant:
            taken.take(differentiable_losses(output, rehearsed))
        trace.copies = [(value, rehearsed.original(tensor)) for value, tensor in trace.copies]
        backwards = bool(rehearsed.losses)
    if trace.reentrant and not trace.transformed:  # opened above, they must be seen as they run in training
        taken.take_of(step, trainer)
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
