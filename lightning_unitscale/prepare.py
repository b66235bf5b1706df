"""From an untouched model to a prepared one; `prepare` reads top to bottom.

record     record_draws              the step, rehearsed and written down; nothing has changed
plan       make_plan                 the scheme's rules for what was seen; the same on all processes
fold       rescale_parameters        weights, in place, to what the plan stores
apply      put_in_force              what stays explicit, where it stands
verify     verify, verify_gradients  the same step again; what is wrong is brought back and refused, or left alone
limit      limit_steps               learning rates, by what one step does before and after
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_unitscale.engine.checks.beside import warn_of_code_beside
from lightning_unitscale.engine.checks.calibration import check_device
from lightning_unitscale.engine.checks.first_loss import is_far_above, loudest_sites, with_less
from lightning_unitscale.engine.checks.first_step import Average, FirstStep, measure_first_step
from lightning_unitscale.engine.checks.gradients_taken import GradientsTaken, take_gradients
from lightning_unitscale.engine.checks.trained_weights import refuse_trained
from lightning_unitscale.engine.checks.verify import verify
from lightning_unitscale.engine.checks.verify_gradients import is_to_be_checked, verify_gradients
from lightning_unitscale.engine.plan.plan import Plan, plan_of
from lightning_unitscale.engine.record.trace import Trace
from lightning_unitscale.engine.runtime.install import rescale_parameters
from lightning_unitscale.engine.runtime.kept_copies import kept_copies, rescale_kept
from lightning_unitscale.errors import UnitScalingError, WrongGradientsError
from lightning_unitscale.in_force import about_to_be_zero, bring_back, forget, put_in_force
from lightning_unitscale.options import Options
from lightning_unitscale.record_step import Step, record, record_draws
from lightning_unitscale.schemes import scheme_of
from lightning_unitscale.schemes.planner import make_plan
from lightning_unitscale.schemes.step_limits import limit_steps, limited

if TYPE_CHECKING:
    import pytorch_lightning as pl


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
    scheme = scheme_of(options)
    current = plan_of(module)
    if current is not None and not scheme.changes_training and current.is_plain:
        forget(module)
    elif current is not None:
        raise UnitScalingError(
            f"{type(module).__name__} is already unit-scaled; call remove_unit_scaling() first to prepare it anew."
        )
    limits_steps = scheme.changes_training and not scheme.keeps_function and options.lr_units == "standard"
    taken = GradientsTaken(module, whole=limits_steps)
    trace, fullest = record_draws(module, step, trainer, agree, taken)
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
    untouched = _first_step(module, plan, taken, step, trainer, agree, average) if limits_steps else None
    zeroed = about_to_be_zero(module, plan)
    rescale_parameters(module, plan)
    rescale_kept(plan, kept)
    put_in_force(module, plan)
    to_be_checked = options.verify and is_to_be_checked(module, plan, trace)
    taken = GradientsTaken(module, whole=untouched is not None, by_loss=to_be_checked)
    if options.verify:
        less, wrong = options, None
        try:
            less = _gate(module, plan, trace, taken, step, options, trainer, agree)
        except WrongGradientsError as error:
            wrong = error
        except BaseException:  # the model's own code may object too, to other values or to a mode around it
            bring_back(module, plan, zeroed, kept)
            raise
        doubtful = trust_functions and any(call.under_function and not call.in_function for call in trace.calls)
        distrust = doubtful and agree({"wrong": wrong is not None})["wrong"]
        if distrust or wrong is not None or less is not options:
            bring_back(module, plan, zeroed, kept)
        if wrong is not None and not distrust:
            raise wrong
        if distrust or less is not options:
            again = options if distrust else less
            trusted = trust_functions and not distrust
            return prepare(module, step, again, trainer, agree, average, trust_functions=trusted)
    elif untouched is not None:
        taken = take_gradients(module, step, trainer, whole=True)
    if untouched is not None:
        scaled = _first_step(module, plan, taken, step, trainer, agree, average)
        if scaled is not None:
            limit_steps(plan, untouched, scaled)
    return plan


def _gate(
    module: nn.Module,
    plan: Plan,
    trace: Trace,
    taken: GradientsTaken,
    step: Step,
    options: Options,
    trainer: pl.Trainer | None,
    agree: Callable[[dict[str, Any]], dict[str, Any]],
) -> Options:
    """The same step under the plan: whether it does what it says; returns options that leave more alone, or these."""
    after = verify(module, plan, trace, lambda: record(module, step, trainer, taken=taken, may_overflow=True))
    losses = agree({"before": trace.loss_numbers, "after": after.loss_numbers, "sites": loudest_sites(plan)})
    if plan.changes_training and is_far_above(losses["before"], losses["after"]):
        return with_less(module, plan, options, losses)
    verify_gradients(module, plan, trace, taken, step, trainer)
    return options


def _first_step(
    module: nn.Module,
    plan: Plan,
    taken: GradientsTaken,
    step: Step,
    trainer: pl.Trainer | None,
    agree: Callable[[dict[str, Any]], dict[str, Any]],
    average: Average,
) -> FirstStep | None:
    """What a step of the model does as it is now; None, with a note in the plan, if that can't be measured."""
    measured: dict[str, Any] = {}
    is_prepared = plan_of(module) is not None
    scales = plan.step_scales("adam", decoupled_decay=True)
    rates = {name: scales[name].lr if is_prepared else 1.0 for name in limited(plan)}
    try:
        measured = asdict(measure_first_step(module, taken, step, rates, trainer, average))
    except RuntimeError as error:
        measured = {"failed": str(error)}
    measured = agree(measured)
    if "failed" in measured:
        plan.notes.append(f"what the first step does was not measured, and no rate limited: {measured['failed']}")
        return None
    return FirstStep(**measured)


def _refuse_nothing(module: nn.Module, trace: Trace, plan: Plan) -> None:
    if trace.transformed and not plan.changes_training and plan.options["format"] is None:
        return  # there is nothing to do, and the step runs the model where it can't be seen
    if not any(site.params for site in plan.sites) or all(p.reason for p in plan.parameters.values()):
        reasons = "; ".join(sorted({p.reason for p in plan.parameters.values() if p.reason})) or "it has no parameters"
        raise UnitScalingError(
            f"nothing in {type(module).__name__} can be scaled ({reasons}; {len(trace.calls)} torch calls were seen). "
            "Check that the step runs the model, and that skip does not cover all of it; scheme='preserve' trains it "
            "as it is."
        )
