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
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_unitscale.engine.checks.beside import warn_of_code_beside
from lightning_unitscale.engine.checks.calibration import check_device, warn_of_no_casts
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
from lightning_unitscale.engine.runtime.kept_state_dicts import refuse_kept_state_dicts
from lightning_unitscale.errors import UnitScalingError, WrongGradientsError
from lightning_unitscale.in_force import about_to_be_zero, bring_back, forget, put_in_force
from lightning_unitscale.options import Options
from lightning_unitscale.record_step import Step, record, record_draws
from lightning_unitscale.schemes import scheme_of
from lightning_unitscale.schemes.planner import make_plan
from lightning_unitscale.schemes.step_limits import limit_steps, limited

if TYPE_CHECKING:
    import pytorch_lightning as pl

Agree = Callable[[dict[str, Any]], dict[str, Any]]


def prepare(
    module: nn.Module,
    step: Step,
    options: Options,
    trainer: pl.Trainer | None = None,
    agree: Agree = lambda plan: plan,
    average: Average = lambda tensor: tensor,
) -> Plan:
    """Record one step of the model and put its plan in force, in place.

    Args:
        module: the untouched model, or, under a scheme that changes nothing, one whose weights alone are the function.
        step: runs one step's forward pass on real data and returns the loss.
        trainer: the Lightning trainer, if there is one, whose loggers and optimizers the step must not reach.
        agree: makes all processes use one process's plan (data-dependent routing may show each another model).
        average: over all processes; the first step is measured on the global batch.

    Raises:
        UnitScalingError: see `unit_scale`.
    """
    current = plan_of(module)
    if current is not None and not scheme_of(options).changes_training and current.is_plain:
        forget(module)
    elif current is not None:
        raise UnitScalingError(
            f"{type(module).__name__} is already unit-scaled; call remove_unit_scaling() first to prepare it anew."
        )
    return _Preparation(module, step, options, trainer, agree, average).run()


@dataclass(frozen=True)
class _Preparation:
    """One attempt; where its plan fails the gate, another one that does less may follow.

    Attributes:
        trust_functions: modules that hand-written autograd.Functions run are run again for the backward pass, as
            checkpoints do; without, no factor is put where another backward pass would not see it.
    """

    module: nn.Module
    step: Step
    options: Options
    trainer: pl.Trainer | None
    agree: Agree
    average: Average
    trust_functions: bool = True

    def run(self) -> Plan:
        """From top to bottom, as the module says."""
        taken = GradientsTaken(self.module, whole=self._limits_steps)
        trace, fullest = record_draws(self.module, self.step, self.trainer, self.agree, taken)
        plan = self._plan(trace, fullest)
        check_device(self.module, plan)
        warn_of_no_casts(self.module, plan)
        kept = kept_copies(self.module, plan, trace, self.trainer)
        refuse_kept_state_dicts(self.module, plan, self.trainer)
        warn_of_code_beside(self.module, plan, trace)
        untouched = self._first_step(plan, taken) if self._limits_steps else None

        bring_back_all = partial(bring_back, self.module, plan, about_to_be_zero(self.module, plan), kept)
        rescale_parameters(self.module, plan)
        rescale_kept(plan, kept)
        put_in_force(self.module, plan)

        if self.options.verify:
            by_loss = is_to_be_checked(self.module, plan, trace)
            taken = GradientsTaken(self.module, whole=untouched is not None, by_loss=by_loss)
            if (again := self._gate(plan, trace, taken, bring_back_all)) is not None:
                plan = again.run()
                plan.options = self.options.to_dict()  # a run that goes on asks for what this one did
                return plan
        elif untouched is not None:
            taken = take_gradients(self.module, self.step, self.trainer, whole=True)
        if untouched is not None and (scaled := self._first_step(plan, taken)) is not None:
            limit_steps(plan, untouched, scaled)
        return plan

    @property
    def _limits_steps(self) -> bool:
        scheme = scheme_of(self.options)
        return scheme.changes_training and not scheme.keeps_function and self.options.lr_units == "standard"

    def _plan(self, trace: Trace, fullest: Trace) -> Plan:
        """What is to be done, the same on all processes; refused where it could not be right."""
        if not self.trust_functions:
            fullest.distrust_functions()
        plan = make_plan(scheme_of(self.options), self.module, fullest, self.options)
        _refuse_nothing(self.module, trace, plan)
        if plan.changes_training and not plan.keeps_function:
            refuse_trained(self.module, trace, plan)
        return Plan.from_dict(self.agree(plan.to_dict()))

    def _gate(
        self, plan: Plan, trace: Trace, taken: GradientsTaken, bring_back_all: Callable[[], None]
    ) -> _Preparation | None:
        """The attempt to make instead, or None if the model does under the plan what the plan says."""
        less, wrong = self.options, None
        try:
            less = self._options_after_the_same_step(plan, trace, taken)
        except WrongGradientsError as error:
            wrong = error
        except BaseException:  # the model's own code may object too, to other values or to a mode around it
            bring_back_all()
            raise
        doubtful = self.trust_functions and any(call.under_function and not call.in_function for call in trace.calls)
        distrust = doubtful and self.agree({"wrong": wrong is not None})["wrong"]
        if not distrust and wrong is None and less is self.options:
            return None
        bring_back_all()
        if distrust:
            return replace(self, trust_functions=False)
        if wrong is not None:
            raise wrong
        return replace(self, options=less)

    def _options_after_the_same_step(self, plan: Plan, trace: Trace, taken: GradientsTaken) -> Options:
        """Options that leave more alone, where the loss of the same step is another under the plan; else these."""
        again = partial(record, self.module, self.step, self.trainer, taken=taken, may_overflow=True)
        after = verify(self.module, plan, trace, again)
        losses = self.agree({"before": trace.loss_numbers, "after": after.loss_numbers, "sites": loudest_sites(plan)})
        if plan.changes_training and is_far_above(losses["before"], losses["after"]):
            if smaller := scheme_of(self.options).begins_smaller():
                return replace(self.options, hyperparameters={**self.options.hyperparameters, **smaller})
            return with_less(self.module, plan, self.options, losses)
        verify_gradients(self.module, plan, trace, taken, self.step, self.trainer)
        return self.options

    def _first_step(self, plan: Plan, taken: GradientsTaken) -> FirstStep | None:
        """What a step of the model does as it is now; None, with a note in the plan, if that can't be measured."""
        measured: dict[str, Any] = {}
        is_prepared = plan_of(self.module) is not None
        scales = plan.step_scales("adam", decoupled_decay=True)
        rates = {name: scales[name].lr if is_prepared else 1.0 for name in limited(plan)}
        try:
            measured = asdict(measure_first_step(self.module, taken, self.step, rates, self.trainer, self.average))
        except RuntimeError as error:
            measured = {"failed": str(error)}
        measured = self.agree(measured)
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
