"""`scale_learning_rates`: a plan's learning-rate multipliers for any optimizer; `ScaledStep` is what it attaches."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.step_scales import FAMILIES
from lightning_unitscale.engine.runtime.placement import check_placement
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.near_names import suggests_arguments
from lightning_unitscale.optim.families import check_family, optimizer_family
from lightning_unitscale.optim.largest_eta import limit_eta
from lightning_unitscale.optim.replaced_parameters import warn_of_replaced
from lightning_unitscale.optim.scaled_step import ScaledStep, changes_steps


@suggests_arguments
def scale_learning_rates(
    optimizer: Optimizer, plan: Plan, *, module: nn.Module | None = None, family: str | None = None
) -> ScaledStep:
    """Make every `optimizer.step()` use the plan's learning-rate multipliers; the parameter groups stay as they are.

    ```python
    plan = unit_scale(model, step)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scale_learning_rates(optimizer, plan)
    ```

    `lr`, `weight_decay` and `eps` in the groups keep the user's values, so any scheduler works, made before or after
    this call, and so do checkpoints, loggers, `add_param_group`, `GradScaler`, closures, and fused, foreach and
    capturable implementations. Calling it again on the same optimizer replaces the multipliers. A copy of the
    optimizer (`copy.deepcopy`, `pickle`) is a plain optimizer on other parameters: call it again for the copy.

    Args:
        optimizer: any `torch.optim.Optimizer`; what Lightning, Fabric or `ZeroRedundancyOptimizer` put around one
            is looked through.
        plan: what `unit_scale` returned, or `callback.plan`. Parameters it doesn't name take plain steps.
        module: where the plan's parameter names are looked up; default: the module the plan was made for.
        family: `"adam"`, `"sgd"`, `"muon"` or another of `optim.families`, for a class `optimizer_family` doesn't know.
            Weight decay then counts as coupled to the gradient unless the group says `decoupled_weight_decay=True`.

    Returns:
        The attachment; its `remove()` gives the plain optimizer back.

    Raises:
        UnitScalingError: the family is unknown; none of the optimizer's parameters is the plan's; multipliers differ
            but the optimizer takes a single step size (LBFGS) or is not stepped by torch's own `step` machinery; a
            module that the plan has put a factor on was replaced.

    Warns:
        of parameters of the plan that the module has not got any more, in another shape, or in another module.
    """
    optimizer = _innermost(optimizer)
    check_family(family, "family")
    prepared = plan.model if module is None else module
    check_placement(prepared)
    warn_of_replaced(prepared, plan)
    family = family or _family_under(plan, optimizer)
    limit_eta(optimizer, plan, prepared, family)
    return ScaledStep(optimizer, plan, family, module)


def _family_under(plan: Plan, optimizer: Optimizer) -> str:
    try:
        return optimizer_family(optimizer)
    except UnitScalingError:
        if changes_steps(plan):
            raise
        return next(iter(FAMILIES))  # where no multiplier differs from 1, all families are the same


def _innermost(optimizer: Optimizer) -> Optimizer:
    for attribute in ("optimizer", "optim"):  # Lightning, Fabric; torch's ZeroRedundancyOptimizer
        if isinstance(inner := getattr(optimizer, attribute, None), Optimizer):
            return _innermost(inner)
    return optimizer
