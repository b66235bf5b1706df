"""Why `load_state_dict` is wrapped: trained weights are not initial weights.

A model trained with unit scaling may be read back by `load_from_checkpoint`, by `torch.load` and `load_state_dict`, or
by Lightning itself in the process that started `ddp_spawn`. None of them knows of plans: they would fail on weights
with explicit factors, and folded ones, which load as the plain weights they are, would be taken for initial values and
rescaled by the next run. All of these ways end in `torch.nn.Module.load_state_dict`, and its state dict carries the
plan (see `engine.plan.state_dict`). So, once this package is imported, that one method looks for it:

    the state dict carries no plan                   as ever
    the module that it is for has a plan in force    as ever
    the plan fits the module                         it is put in force first: same function, same learning rates
    it does not (another head, a part of the         weights that alone are the function are loaded as ever, and the
    weights, …)                                      module remembers that they are trained; others are refused

An unprepared twin that is given a prepared model's state dict, a target network or an average, say, becomes prepared,
and equal to it as a function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_unitscale.engine.checks.trained_weights import remember_trained, rescaled
from lightning_unitscale.engine.plan.plan import Plan, plan_of
from lightning_unitscale.engine.plan.state_dict import carried_plans, decode
from lightning_unitscale.engine.runtime.install import rules_in_force
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.in_force import forget, put_in_force


@contextmanager
def plans_in_force(module: nn.Module, state: Mapping[str, Any]) -> Iterator[None]:
    """Put the plans that a state dict carries in force before it is loaded; undone if loading it fails."""
    prepared: list[nn.Module] = []
    trained: list[nn.Module] = []
    try:
        for name, carried in sorted(carried_plans(state).items()):
            owner = _unprepared(module, name)
            if owner is None:
                continue
            plan = decode(carried)
            try:
                _check_fits(plan, owner, state, f"{name}." if name else "")
            except UnitScalingError:
                if not plan.is_plain:
                    raise
                trained.append(owner)
            else:
                put_in_force(owner, plan)
                prepared.append(owner)
        yield
    except BaseException:
        for owner in prepared:
            forget(owner)
        raise
    for owner in trained:
        remember_trained(owner)


def _unprepared(module: nn.Module, name: str) -> nn.Module | None:
    """The module of that name, if it is there and neither it nor what it is part of has a plan in force."""
    owner: nn.Module | None = module
    for part in name.split(".") if name else ():
        if owner is None or plan_of(owner) is not None:
            return None
        owner = owner._modules.get(part)
    return None if owner is None or plan_of(owner) is not None or rules_in_force(owner) is not None else owner


def _check_fits(plan: Plan, module: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """
    Raises:
        UnitScalingError: the plan is of another model, or the state dict lacks weights that the plan has rescaled.
    """
    plan.check_matches(module)
    missing = [
        name
        for name in rescaled(plan)
        if not any(prefix + alias in state for alias in (name, *plan.parameters[name].aliases))
    ]
    if missing:
        raise UnitScalingError(
            f"these weights were stored under a unit-scaling plan, and {', '.join(missing[:3])}"
            f"{' …' if len(missing) > 3 else ''} are not among them. {type(module).__name__} can take them as a whole "
            "only: its own initial weights are not at the scale that the plan stores."
        )
