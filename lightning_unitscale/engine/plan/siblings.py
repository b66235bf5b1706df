"""Experts that got no token in the recorded step, and blocks that were left out, take the rule of those that ran.

Siblings are parameters of one shape whose names differ in one number ("experts.3.w1.weight", "experts.5.w1.weight").
Their modules ("experts.3" and "experts.5") have the same parts, so whatever the plan says of one holds for the other.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from dataclasses import replace
from math import isclose

from lightning_unitscale.engine.plan.factors import ROUNDING, to_unit_scale
from lightning_unitscale.engine.plan.parameter_plan import UNUSED, ParameterPlan
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.rename import follow_renamed
from lightning_unitscale.engine.plan.site import READING, Site
from lightning_unitscale.engine.record.keys import ParameterKey, UseId
from lightning_unitscale.engine.record.places import Frame


def include_siblings(plan: Plan, modules: Collection[str]) -> dict[str, str]:
    """Give every unused parameter the rule of a sibling that was used, in place; returns the sibling's name of each.

    Args:
        modules: the names of all modules of the model.
    """
    used = [parameter for parameter in plan.parameters.values() if parameter.role != "unused"]
    models: dict[str, str] = {}
    renamings: dict[tuple[str, str], _Renaming] = {}
    for name, parameter in plan.parameters.items():
        if parameter.reason != UNUSED:
            continue
        model = next((other for other in used if _are_siblings(parameter, other, modules)), None)
        if model is not None:
            models[name] = model.name
            plan.parameters[name] = like(parameter, model)
            renaming = _Renaming(model.name, name)
            renamings.setdefault((renaming.model, renaming.sibling), renaming)
            _copy_sites(plan, renaming)
    ran = {name for name in plan.parameters if name not in models}
    for renaming in renamings.values():
        follow_renamed(plan, renaming.of)
        if not any(name.startswith(f"{renaming.sibling}.") for name in ran):
            _copy_free_sites(plan, renaming)
    if models:
        plan.notes.append(
            f"{len(models)} parameters got no data in the recorded step and take the rule of their siblings"
        )
    return models


def _are_siblings(one: ParameterPlan, other: ParameterPlan, modules: Collection[str]) -> bool:
    if one.shape != other.shape or not differ_in_a_number(one.name, other.name):
        return False
    renaming = _Renaming(other.name, one.name)
    return all(renaming.of(name) in modules for name in modules)


def differ_in_a_number(one: str, other: str) -> bool:
    """Whether two names are the same but for one number: "experts.3.w1.weight" and "experts.5.w1.weight"."""
    left, right = one.split("."), other.split(".")
    differing = [(a, b) for a, b in zip(left, right, strict=False) if a != b]
    return len(left) == len(right) and len(differing) == 1 and all(part.isdigit() for part in differing[0])


def like(parameter: ParameterPlan, model: ParameterPlan) -> ParameterPlan:
    """What the plan says of `model`, said of another parameter like it."""
    copy = deepcopy(model)
    copy.name, copy.aliases, copy.initial_rms = parameter.name, parameter.aliases, parameter.initial_rms
    if parameter.initial_rms and isclose(copy.initial_factor * model.initial_rms, 1.0, rel_tol=ROUNDING):
        copy.set_constant("initial_factor", [to_unit_scale(parameter.initial_rms)])
    return copy


class _Renaming:
    """From one expert's names to its sibling's: they differ from each other in one number."""

    def __init__(self, model: str, sibling: str) -> None:
        self.parameters = ParameterKey(model), ParameterKey(sibling)
        left, right = model.split("."), sibling.split(".")
        length = next(i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b) + 1
        self.model, self.sibling = ".".join(left[:length]), ".".join(right[:length])

    def of(self, name: str) -> str:
        inside = name == self.model or name.startswith(f"{self.model}.")
        return self.sibling + name.removeprefix(self.model) if inside else name


def _copy_sites(plan: Plan, renaming: _Renaming) -> None:
    model, sibling = renaming.parameters
    for site in list(plan.sites):
        into = [use for use in site.fold_into if use.key == model]
        if (model not in site.multipliers and not into) or site.role == READING:
            continue  # what code reads is known of each parameter by itself
        twin = _twin(plan, site, renaming.of(site.module))
        if model in site.multipliers:
            twin.params.append(sibling)
            twin.set_factors(sibling, site.causes[model])
        twin.fold_into += [UseId(sibling, op) for _, op in into]
    for where, method, keys in list(plan.frames):
        renamed = renaming.of(where)
        if model in keys or renamed != where:
            known = plan.frame_plan(Frame(renamed, method)).keys
            if model in keys and sibling not in known:
                known.append(sibling)


def _copy_free_sites(plan: Plan, renaming: _Renaming) -> None:
    """Give a module that did not run the parameter-free sites of its sibling, those that no weight takes among them.

    Where weights behind the siblings take the factor, they have it already.
    """
    known = {site.place for site in plan.sites}
    for site in list(plan.sites):
        module = renaming.of(site.module)
        if site.ordinal is not None and module != site.module and site.place._replace(module=module) not in known:
            twin = _twin(plan, site, module)
            twin.fold_into, twin.beside = list(site.fold_into), bool(site.fold_into)


def _twin(plan: Plan, site: Site, module: str) -> Site:
    """The sibling's site: a parameter-free one of a shared module is the same, any other is its own."""
    if site.ordinal is not None and module == site.module:
        return site
    place = site.place._replace(module=module)
    for known in plan.sites:
        if known.place == place and not known.calls:
            return known
    twin = replace(site, module=module, calls=0, params=[], multipliers={}, causes={}, fold_into=[], rms_before={})
    if site.ordinal is not None:
        twin.set_factors("", site.causes[""])
    plan.sites.append(twin)
    return twin
