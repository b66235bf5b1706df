"""A plan, or a part of it, said of other names.

Of a model inside its LightningModule, or of the LightningModule around a model; of an expert's sibling (`siblings`); of
a copy inside the model (`copies`).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

from lightning_unitscale.engine.plan.plan import FramePlan, Plan
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.keys import ParameterKey, UseId

Rename = Callable[[str], str]


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


def _renamed(plan: Plan, rename: Rename) -> Plan:
    renamed = Plan.from_dict(plan.to_dict())
    renamed.parameters = {}
    for parameter in plan.parameters.values():
        copy = deepcopy(parameter)
        copy.name, copy.aliases = rename(copy.name), [rename(alias) for alias in copy.aliases]
        renamed.parameters[copy.name] = copy
    renamed.sites = [renamed_site(site, rename) for site in plan.sites]
    renamed.frames = [
        FramePlan(rename(f.module), f.method, [key.renamed(rename) for key in f.keys]) for f in plan.frames
    ]
    return renamed


def renamed_site(site: Site, rename: Rename) -> Site:
    """A copy of a site whose module and parameters have other names."""

    def key(name: str) -> ParameterKey:
        return ParameterKey(name).renamed(rename)

    copy = deepcopy(site)
    copy.module = rename(site.module)
    copy.params = [key(name) for name in site.params]
    copy.multipliers = {key(name): value for name, value in site.multipliers.items()}
    copy.causes = {key(name): list(factors) for name, factors in site.causes.items()}
    copy.factors = {key(name): value for name, value in site.factors.items()}
    copy.fold_into = [UseId(key(name), op) for name, op in site.fold_into]
    return copy
