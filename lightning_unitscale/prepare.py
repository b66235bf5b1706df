"""From an untouched model to a prepared one: record → plan → fold → apply → verify, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_unitscale.engine.analysis.loss_path import used_parameters
from lightning_unitscale.engine.checks.beside import warn_of_code_beside
from lightning_unitscale.engine.checks.calibration import Calibration, check_device, fall_back
from lightning_unitscale.engine.checks.first_loss import is_far_above, loudest_sites
from lightning_unitscale.engine.checks.first_step import Average, FirstStep, measure_first_step
from lightning_unitscale.engine.checks.gradients import differentiable_losses, rehearsed_gradients
from lightning_unitscale.engine.checks.sharded import refuse_sharded
from lightning_unitscale.engine.checks.trained_weights import refuse_trained
from lightning_unitscale.engine.checks.verify import verify
from lightning_unitscale.engine.checks.verify_casts import verify_casts
from lightning_unitscale.engine.checks.verify_gradients import GradientsTaken, is_to_be_checked, verify_gradients
from lightning_unitscale.engine.plan.fold import folded_copy
from lightning_unitscale.engine.plan.plan import ATTRIBUTE, Plan, plan_of
from lightning_unitscale.engine.plan.rename import plan_around
from lightning_unitscale.engine.plan.siblings import differ_in_a_number
from lightning_unitscale.engine.plan.site import READING
from lightning_unitscale.engine.plan.state_dict import add_marker, remove_marker
from lightning_unitscale.engine.record.random_draws import draw_anew, random_state
from lightning_unitscale.engine.record.recorder import loss_tensors, recording
from lightning_unitscale.engine.record.rehearsal import Rehearsal, rehearsal
from lightning_unitscale.engine.record.trace import Trace
from lightning_unitscale.engine.runtime.install import (
    install,
    rescale_parameters,
    restore_parameters,
    uninstall,
    untouched_factors,
)
from lightning_unitscale.engine.runtime.kept_copies import Kept, kept_copies, rescale_kept
from lightning_unitscale.engine.runtime.placement import check_placement
from lightning_unitscale.errors import NoLossError, UnitScalingError, WrongGradientsError
from lightning_unitscale.optim.unscaled_steps import watch_steps
from lightning_unitscale.options import Options
from lightning_unitscale.schemes import scheme_of
from lightning_unitscale.schemes.planner import make_plan
from lightning_unitscale.schemes.step_limits import limit_steps, limited

if TYPE_CHECKING:
    import pytorch_lightning as pl

MORE_DRAWS = 3
Step = Callable[[Rehearsal], Any]  # runs one step's forward pass and returns its loss, or a dict with it


def prepare(
    module: nn.Module,
    step: Step,
    options: Options,
    trainer: pl.Trainer | None = None,
    agree: Callable[[dict[str, Any]], dict[str, Any]] = lambda plan: plan,
    average: Average = lambda tensor: tensor,
    *,
    trust_functions: bool = True,
) -> Plan:
    """Record one step of the model and put its plan in force, in place.

    Args:
        module: the untouched model, or, under a scheme that changes nothing, one whose weights alone are the function.
        step: runs one step's forward pass on real data and returns the loss.
        trainer: the Lightning trainer, if there is one, whose loggers and optimizers the step must not reach.
        agree: makes all processes use one process's plan (data-dependent routing may show each another model).
        average: over all processes; the first step is measured on the global batch.
        trust_functions: modules that hand-written autograd.Functions run are run again for the backward pass, as
            checkpoints do; without, no factor is put where another backward pass would not see it.

    Raises:
        UnitScalingError: see `unit_scale`.
    """
    refuse_sharded(module)
    scheme = scheme_of(options)
    current = plan_of(module)
    if current is not None and not scheme.changes_training and current.is_plain:
        forget(module)
    elif current is not None:
        raise UnitScalingError(
            f"{type(module).__name__} is already unit-scaled; call remove_unit_scaling() first to prepare it anew."
        )
    trace, fullest = record_draws(module, step, trainer, agree)
    if not trust_functions:
        fullest.distrust_functions()
    plan = make_plan(scheme, module, fullest, options)
    _refuse_nothing(module, trace, plan)
    if plan.changes_training and not plan.keeps_function:
        refuse_trained(module, trace, plan)
    plan = Plan.from_dict(agree(plan.to_dict()))
    check_device(module, plan)
    kept = kept_copies(module, plan, trace, trainer)
    warn_of_code_beside(module, plan, trace)
    untouched = _first_step(module, plan, step, trainer, agree, average)
    zeroed = _about_to_be_zero(module, plan)
    rescale_parameters(module, plan)
    rescale_kept(plan, kept)
    put_in_force(module, plan)
    if options.verify:
        wrong: WrongGradientsError | None = None
        try:
            taken = GradientsTaken(module)
            take = taken if is_to_be_checked(module, plan, trace) else None
            after = verify(module, plan, trace, lambda: record(module, step, trainer, taken=take, may_overflow=True))
            losses = agree({"before": trace.loss_numbers, "after": after.loss_numbers, "sites": loudest_sites(plan)})
            is_another_function = plan.changes_training and is_far_above(losses["before"], losses["after"])
            less = _with_less(module, plan, options, losses) if is_another_function else None
            if less is None:
                verify_gradients(module, plan, trace, taken, step, trainer)
        except WrongGradientsError as error:
            wrong = error
        except UnitScalingError:
            _bring_back(module, plan, zeroed, kept)
            raise
        doubtful = trust_functions and any(call.under_function and not call.in_function for call in trace.calls)
        retry = doubtful and agree({"wrong": wrong is not None})["wrong"]
        if retry or wrong is not None:
            _bring_back(module, plan, zeroed, kept)
        if retry:
            return prepare(module, step, options, trainer, agree, average, trust_functions=False)
        if wrong is not None:
            raise wrong
        if less is not None:
            _bring_back(module, plan, zeroed, kept)
            return prepare(module, step, less, trainer, agree, average, trust_functions=trust_functions)
    if untouched is not None:
        scaled = _first_step(module, plan, step, trainer, agree, average)
        if scaled is not None:
            limit_steps(plan, untouched, scaled)
    return plan


def _first_step(
    module: nn.Module,
    plan: Plan,
    step: Step,
    trainer: pl.Trainer | None,
    agree: Callable[[dict[str, Any]], dict[str, Any]],
    average: Average,
) -> FirstStep | None:
    """What a step of the model does as it is now, where the plan's rates depend on that."""
    if not plan.changes_training or plan.keeps_function or plan.lr_units != "standard":
        return None
    measured: dict[str, Any] = {}
    is_prepared = plan_of(module) is not None
    scales = plan.step_scales("adam", decoupled_decay=True)
    rates = {name: scales[name].lr if is_prepared else 1.0 for name in limited(plan)}
    try:
        measured = asdict(measure_first_step(module, step, rates, trainer, average))
    except RuntimeError as error:
        measured = {"failed": str(error)}
    measured = agree(measured)
    if "failed" in measured:
        plan.notes.append(f"what the first step does was not measured, and no rate limited: {measured['failed']}")
        return None
    return FirstStep(**measured)


def _with_less(module: nn.Module, plan: Plan, options: Options, losses: dict[str, Any]) -> Options:
    """Options for a plan that leaves alone what made the first loss too large.

    Raises:
        UnitScalingError: with lr_units="umup" a model that is left alone has no learning rate.

    Warns:
        of what is left alone.
    """
    found = (
        f"under scheme={plan.scheme!r} the first loss of {type(module).__name__} is {_numbers(losses['after'])}, that "
        f"of the untouched model {_numbers(losses['before'])}"
    )
    sites = [name for name in losses["sites"] if name]
    named = f"{', '.join(sites[:5])}{' …' if len(sites) > 5 else ''}" or "no single matmul"
    if plan.lr_units != "standard":
        raise UnitScalingError(
            f"{found}; outputs far above RMS 1: {named}. List those in skip, or use scheme='preserve' with an ordinary "
            "learning rate."
        )
    scaled = {site.module for site in plan.sites if site.params and not site.reason}
    if sites and not scaled <= set(sites):
        less, left = replace(options, skip=(*options.skip, *sites)), named
    else:
        less, left = (
            replace(options, scheme="preserve", hyperparameters={}),
            "the whole model, which trains as if untouched",
        )
    warnings.warn(f"unit scaling: {found}; outputs far above RMS 1: {named}. Left alone: {left}.", stacklevel=4)
    return less


def _numbers(losses: list[float]) -> str:
    return ", ".join(f"{loss:.4g}" for loss in losses)


def measure_operands(module: nn.Module, step: Step, options: Options, trainer: pl.Trainer | None = None) -> None:
    """Measure the operand scales of a prepared module on one step, forward and backward, that leaves no trace.

    In a Trainer this is not needed: scales are measured while it trains.

    Warns:
        of sites that cast nothing, as an operand of theirs is all 0 in this step (behind zero-initialised weights) or
        they were not called, until they are measured again.
    """
    plan = plan_of(module)
    assert plan is not None
    if not plan.cast_sites:
        return
    calibration = Calibration(module, plan, options.recalibrate)
    rehearsed_gradients(module, step, trainer, observer=calibration.observe(0))
    calibration.finish()
    if options.verify:
        for use, problem in verify_casts(module, plan, step, trainer).items():
            fall_back(module, plan, use, problem)
    unknown = [site.name for site in plan.cast_sites if not site.operand_scales]
    if unknown:
        warnings.warn(
            f"unit scaling: {len(unknown)} sites stay in the compute dtype, as an operand of theirs was all 0 or not "
            f"seen in this step: {', '.join(unknown[:3])}{' …' if len(unknown) > 3 else ''}. Inside `recalibrating` "
            "they are measured again as the model trains.",
            stacklevel=3,
        )


def record_draws(
    module: nn.Module, step: Step, trainer: pl.Trainer | None, agree: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[Trace, Trace]:
    """The step as its own random numbers have it, and as it ran most of the model (stochastic depth, LayerDrop).

    Other numbers are drawn, a few times, only where a step that draws any leaves parameters unused that no sibling
    speaks for.
    """
    first = record(module, step, trainer)
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
    with rehearsal(module, trainer) as rehearsed, torch.enable_grad(), taken or nullcontext():
        with recording(module) as recorder:
            if draw:
                draw_anew(draw)
            before = random_state()
            output = step(rehearsed)
            trace = recorder.finish(output, rehearsed.losses)
        if taken is not None:
            taken.take(differentiable_losses(output, rehearsed))
        trace.drew = random_state() != before
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


def put_in_force(module: nn.Module, plan: Plan) -> None:
    """Install the plan on a model whose weights already are what it stores.

    Raises:
        UnitScalingError: the plan is of another model.
    """
    plan.check_matches(module)
    install(module, plan)
    module.__dict__[ATTRIBUTE] = plan
    add_marker(module, plan)
    plan.bind(module)
    watch_steps()


def adopt(module: nn.Module) -> Plan | None:
    """The plan in force on the module; one on the part that has all its parameters is made a plan of the whole.

    A network with a plan, given its weights on its own, may be trained inside a LightningModule.
    """
    plan = plan_of(module)
    if plan is not None:
        return plan
    for name, child in module.named_modules():
        inner = plan_of(child)
        if inner is None:
            continue
        plan = plan_around(inner, name)
        try:
            plan.check_matches(module)
        except UnitScalingError:
            continue
        forget(child)
        put_in_force(module, plan)
        return plan
    return None


def remove(module: nn.Module) -> None:
    """Make a prepared model plain; see `remove_unit_scaling`."""
    plan = plan_of(module)
    if plan is None:
        raise UnitScalingError(f"{type(module).__name__} is not unit-scaled; there is nothing to remove.")
    check_placement(module)
    folded = folded_copy(plan)
    left = [site for site in folded.explicit_sites if site.role != READING]
    if left:
        sites = ", ".join(
            f"{site.name} ({site.role}; {site.reason or 'two factors for one weight'})" for site in left[:3]
        )
        raise UnitScalingError(
            f"{len(left)} factors cannot be moved into weights: {sites}{' …' if len(left) > 3 else ''}. "
            "The model was left as it was; keep unit scaling in place, or have a plain copy made that can move them: "
            "lightning_unitscale.export.to_plain(model, forward), unitscale export for a checkpoint of the recipes."
        )
    restore_parameters(module, plan, folded)
    forget(module)
    if read := [site for site in folded.explicit_sites if site.role == READING]:
        warnings.warn(
            f"unit scaling was removed: {read[0].reason}, and now reads it as it is stored. Penalties on weights have "
            "another size from here on.",
            stacklevel=3,
        )


def forget(module: nn.Module) -> None:
    """Take the plan off, weights as they are."""
    uninstall(module)
    remove_marker(module)
    module.__dict__.pop(ATTRIBUTE, None)


def _about_to_be_zero(module: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Copies of what no factor brings back: biases, which a scheme lets begin at 0."""
    named = dict(module.named_parameters())
    return {p.name: named[p.name].detach().clone() for p in plan.parameters.values() if p.from_initial == 0.0}


def _bring_back(module: nn.Module, plan: Plan, zeroed: dict[str, Tensor], kept: list[Kept]) -> None:
    """Take a plan off again that was refused; weights and their kept copies are what they were, to rounding."""
    forget(module)
    factors = untouched_factors(plan)
    rescaled = [*module.named_parameters(), *((name, tensor) for _, tensor, name in kept)]
    with torch.no_grad():
        for name, tensor in rescaled:
            if name in zeroed:
                tensor.copy_(zeroed[name])
            elif name in factors:
                tensor.mul_(factors[name])


def _refuse_nothing(module: nn.Module, trace: Trace, plan: Plan) -> None:
    if trace.transformed and not plan.changes_training and plan.options["format"] is None:
        return  # there is nothing to do, and the step runs the model where it can't be seen
    if not any(site.params for site in plan.sites) or all(p.reason for p in plan.parameters.values()):
        reasons = "; ".join(sorted({p.reason for p in plan.parameters.values() if p.reason})) or "it has no parameters"
        raise UnitScalingError(
            f"nothing in {type(module).__name__} can be scaled ({reasons}; {len(trace.calls)} torch calls were seen). "
            "Check that the step runs the model, and that skip does not cover all of it."
        )
