"""What the optimizers of one run are given, each once for each plan: learning-rate multipliers in every step.

DeepSpeed takes an optimizer apart before its first step: there, groups are split by multiplier as it is handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.step_scales import check_has_rates
from lightning_unitscale.namespaces import classes
from lightning_unitscale.optim.engine_groups import optimizer_for_engine
from lightning_unitscale.optim.families import check_family, family_of_group, optimizer_family
from lightning_unitscale.optim.late_parameters import may_learn_late
from lightning_unitscale.optim.ordinary_units import warn_of_ordinary_units
from lightning_unitscale.optim.scale_learning_rates import scale_learning_rates
from lightning_unitscale.optim.scaled_step import ScaledStep, changes_steps
from lightning_unitscale.options import Options
from lightning_unitscale.schemes import find


def _takes_steps(optimizer: Optimizer) -> bool:
    """Not the one that Lightning puts in the place of what `configure_optimizers` did not return."""
    return not isinstance(optimizer, classes("core.optimizer._MockOptimizer"))


class RunOptimizers:
    """The scaled steps of a run.

    Args:
        family: a name in `optim.families`, for optimizer classes that `optimizer_family` does not know.

    Raises:
        UnitScalingError: there is no such family.
    """

    def __init__(self, family: str | None) -> None:
        check_family(family, "optimizer_family")
        self.family = family
        self._steps: dict[Optimizer, tuple[Plan, ScaledStep | None]] = {}  # None where no step is to be another

    def check(self, optimizers: Iterable[Optimizer], options: Options) -> None:
        """Before anything is changed.

        Raises:
            UnitScalingError: the family of one of their groups is unknown, or the scheme has no rates for it.
        """
        known = find(options.scheme).families
        for optimizer in filter(_takes_steps, optimizers):
            for family in {family_of_group(group) or self._family_of(optimizer) for group in optimizer.param_groups}:
                check_has_rates(options.scheme, known, family, options.lr_units)

    def scale(self, optimizer: Optimizer, plan: Plan, module: nn.Module) -> None:
        """Give an optimizer the plan's learning-rate multipliers, if it has not got them and there is cause to."""
        known, step = self._steps.get(optimizer, (None, None))
        if known is plan or not _takes_steps(optimizer):
            return
        if step is not None:
            step.remove()
        step = None
        if changes_steps(plan) or may_learn_late(plan):
            step = scale_learning_rates(optimizer, plan, module=module, family=self._family_of(optimizer))
            if plan.lr_units == "umup":
                warn_of_ordinary_units(optimizer, find(plan.scheme).least_usual_rate)
        self._steps[optimizer] = plan, step

    def hand_over(
        self, proceed: Callable[[Optimizer], tuple[Any, Optimizer]], optimizer: Optimizer, plan: Plan, module: nn.Module
    ) -> tuple[Any, Optimizer]:
        """Give DeepSpeed an optimizer whose groups have one multiplier each.

        Args:
            proceed: makes an engine and its optimizer with an optimizer.
            module: what the plan is of.
        """
        if changes_steps(plan):
            optimizer = optimizer_for_engine(optimizer, plan, module, self._family_of(optimizer))
        engine, made = proceed(optimizer)
        self._steps[made] = plan, None
        return engine, made

    def release(self) -> None:
        """Give the optimizers their own steps back."""
        for _, step in self._steps.values():
            if step is not None:
                step.remove()
        self._steps.clear()

    def _family_of(self, optimizer: Optimizer) -> str:
        return optimizer_family(optimizer, otherwise=self.family)
