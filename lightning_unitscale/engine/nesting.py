"""A plan said of another root: of a model inside its LightningModule, or of the LightningModule around a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_unitscale.engine.plan import Plan


def plan_inside(plan: Plan, child: str) -> Plan:
    """The plan of a module as the plan of its only child that has parameters.

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

    return _renamed(plan, inner, [frame for frame in plan.frames if frame[0] == child or frame[0].startswith(prefix)])


def plan_around(plan: Plan, child: str) -> Plan:
    """The inverse of `plan_inside`: the plan of a module that has the planned one as its child."""
    return _renamed(plan, lambda name: f"{child}.{name}" if name else child, plan.frames)


def _renamed(plan: Plan, rename: Callable[[str], str], frames: list[list[Any]]) -> Plan:
    def key(name: str) -> str:  # "" is the output of a parameter-free site, "a+b" an expression of two parameters
        return "+".join(sorted(map(rename, name.split("+")))) if name else ""

    renamed = Plan.from_dict(plan.to_dict())
    renamed.parameters = {}
    for parameter in Plan.from_dict(plan.to_dict()).parameters.values():
        parameter.name = rename(parameter.name)
        parameter.aliases = [rename(alias) for alias in parameter.aliases]
        renamed.parameters[parameter.name] = parameter
    for site in renamed.sites:
        site.module = rename(site.module)
        site.params = [key(name) for name in site.params]
        site.multipliers = {key(name): value for name, value in site.multipliers.items()}
        site.factors = {key(name): value for name, value in site.factors.items()}
        site.fold_into = [[key(name), op] for name, op in site.fold_into]
    renamed.frames = [[rename(where), method, [key(name) for name in keys]] for where, method, keys in frames]
    return renamed
