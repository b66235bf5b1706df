"""A plan said of another root: of a model inside its LightningModule, or of the LightningModule around a model."""

from __future__ import annotations

from collections.abc import Callable

from lightning_unitscale.engine.plan.plan import FramePlan, Plan
from lightning_unitscale.engine.record.keys import ParameterKey, UseId


def plan_inside(plan: Plan, child: str) -> Plan:
    """The plan of a module as the plan of its only child that has parameters.

    Calls outside the child, all left alone, are dropped from it.

    Args:
        plan: with names such as "model.lm_head.weight".
        child: name of that child, "model".

    Raises:
        ValueError: the plan speaks of parameters or factors elsewhere.
    """
    prefix = f"{child}."

    def inner(name: str) -> str:
        if name != child and not name.startswith(prefix):
            raise ValueError(f"{name or 'the root module'} is not part of {child}")
        return name[len(prefix) :]

    def is_inside(where: str) -> bool:
        return where == child or where.startswith(prefix)

    kept = Plan.from_dict(plan.to_dict())
    explicit = [site.name for site in plan.explicit_sites]
    kept.sites = [site for site in kept.sites if is_inside(site.module) or site.name in explicit]
    kept.frames = [frame for frame in kept.frames if is_inside(frame.module)]
    return _renamed(kept, inner)


def plan_around(plan: Plan, child: str) -> Plan:
    """The inverse of `plan_inside`: the plan of a module that has the planned one as its child."""
    return _renamed(plan, lambda name: f"{child}.{name}" if name else child)


def _renamed(plan: Plan, rename: Callable[[str], str]) -> Plan:
    def renamed_key(key: str) -> ParameterKey:
        return ParameterKey(key).renamed(rename)

    renamed = Plan.from_dict(plan.to_dict())
    renamed.parameters = {}
    for parameter in Plan.from_dict(plan.to_dict()).parameters.values():
        parameter.name = rename(parameter.name)
        parameter.aliases = [rename(alias) for alias in parameter.aliases]
        renamed.parameters[parameter.name] = parameter
    for site in renamed.sites:
        site.module = rename(site.module)
        site.params = [renamed_key(key) for key in site.params]
        site.multipliers = {renamed_key(key): value for key, value in site.multipliers.items()}
        site.factors = {renamed_key(key): value for key, value in site.factors.items()}
        site.fold_into = [UseId(renamed_key(key), op) for key, op in site.fold_into]
    renamed.frames = [FramePlan(rename(f.module), f.method, list(map(renamed_key, f.keys))) for f in plan.frames]
    return renamed
