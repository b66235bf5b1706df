"""A plan, or a part of it, said of other names.

Of a model inside its LightningModule, or of the LightningModule around a model; of an expert's sibling (`siblings`); of
a copy inside the model (`copies`).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

from lightning_unitscale.engine.plan.plan import FramePlan, Plan
from lightning_unitscale.engine.plan.site import READING, Site
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


def plan_of_part(plan: Plan, child: str) -> Plan:
    """What a plan says of one module among others; what it says of the others is dropped.

    Raises:
        ValueError: a factor outside the child belongs to its weights, which are another function without it.
    """
    prefix = f"{child}."

    def is_inside(key: ParameterKey) -> bool:
        return all(name.startswith(prefix) for name in key.names)

    part = Plan.from_dict(plan.to_dict())
    part.parameters = {name: p for name, p in part.parameters.items() if name.startswith(prefix)}
    for parameter in part.parameters.values():
        parameter.aliases = [alias for alias in parameter.aliases if alias.startswith(prefix)]
    if outside := factors_outside(plan, child):
        raise ValueError(f"{outside[0].name} has a factor for weights of {child}")
    part.sites = [s for s in part.sites if f"{s.module}.".startswith(prefix) and all(map(is_inside, s.params))]
    for site in part.sites:
        site.fold_into = [use for use in site.fold_into if is_inside(ParameterKey(use.key))]
    part.frames = [
        FramePlan(f.module, f.method, [key for key in f.keys if is_inside(key)])
        for f in part.frames
        if f"{f.module}.".startswith(prefix)
    ]
    part.followed_with_others = {k: ways for k, ways in part.followed_with_others.items() if is_inside(ParameterKey(k))}
    return _renamed(part, lambda name: name[len(prefix) :])


def factors_outside(plan: Plan, child: str) -> list[Site]:
    """The sites outside a module at which its weights have explicit factors."""
    prefix = f"{child}."
    return [
        site
        for site in plan.explicit_sites
        if site.role != READING
        and not f"{site.module}.".startswith(prefix)
        and any(name.startswith(prefix) for key in site.params for name in key.names)
    ]


def factors_inside(plan: Plan, child: str) -> list[Site]:
    """The sites inside a module with explicit factors."""
    return [s for s in plan.explicit_sites if s.role != READING and f"{s.module}.".startswith(f"{child}.")]


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
    renamed.followed_with_others = {
        str(ParameterKey(key).renamed(rename)): ways for key, ways in renamed.followed_with_others.items()
    }
    return renamed


def follow_renamed(plan: Plan, rename: Rename) -> None:
    """Have what is made of parameters under their other names followed in the same ways, in place."""
    for key, ways in list(plan.followed_with_others.items()):
        known = plan.followed_with_others.setdefault(str(ParameterKey(key).renamed(rename)), [])
        known += [way for way in ways if way not in known]


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
