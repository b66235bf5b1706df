"""Experts that got no token in the recorded step take the rule of those that did.

Siblings are parameters of one shape whose names differ in one number ("experts.3.w1.weight", "experts.5.w1.weight").
"""

from __future__ import annotations

from copy import deepcopy

from lightning_unitscale.engine.plan import ParameterPlan, Plan


def include_siblings(plan: Plan) -> None:
    """Give every unused parameter the rule of a sibling that was used, in place."""
    used = [parameter for parameter in plan.parameters.values() if parameter.role != "unused"]
    renames: dict[str, str] = {}
    for name, parameter in plan.parameters.items():
        model = next((other for other in used if _are_siblings(parameter, other)), None)
        if parameter.role == "unused" and model is not None:
            plan.parameters[name] = _like(parameter, model)
            renames[name] = model.name
    if not renames:
        return
    for name, model_name in renames.items():
        own_module, model_module = name.rpartition(".")[0], model_name.rpartition(".")[0]
        _copy_sites(plan, name, model_name, own_module, model_module)
    plan.notes.append(f"{len(renames)} parameters got no data in the recorded step and take the rule of their siblings")


def _are_siblings(one: ParameterPlan, other: ParameterPlan) -> bool:
    if one.shape != other.shape:
        return False
    left, right = one.name.split("."), other.name.split(".")
    differing = [(a, b) for a, b in zip(left, right, strict=False) if a != b]
    return len(left) == len(right) and len(differing) == 1 and all(part.isdigit() for part in differing[0])


def _like(parameter: ParameterPlan, model: ParameterPlan) -> ParameterPlan:
    copy = deepcopy(model)
    copy.name, copy.aliases, copy.initial_rms = parameter.name, parameter.aliases, parameter.initial_rms
    scaled = copy.initial_factor not in (0.0, 1.0)
    if scaled and parameter.initial_rms:
        copy.initial_factor = 1 / parameter.initial_rms
    return copy


def _copy_sites(plan: Plan, name: str, model_name: str, own_module: str, model_module: str) -> None:
    for site in list(plan.sites):
        if model_name in site.multipliers:
            where = _renamed(site.module, model_module, own_module)
            twin = next((s for s in plan.sites if (s.module, s.op, s.calls) == (where, site.op, 0)), None)
            if twin is None:
                twin = deepcopy(site)
                twin.module, twin.calls = where, 0
                twin.params, twin.multipliers, twin.rms_before = [], {}, {}
                plan.sites.append(twin)
            twin.params.append(name)
            twin.multipliers[name] = site.multipliers[model_name]
        elif any(key == model_name for key, _ in site.fold_into):
            site.fold_into += [[name, op] for key, op in list(site.fold_into) if key == model_name]
    for module, method, keys in list(plan.frames):
        if model_name in keys:
            renamed = _renamed(module, model_module, own_module)
            frame = next((f for f in plan.frames if f[0] == renamed and f[1] == method), None)
            if frame is None:
                plan.frames.append([renamed, method, [name]])
            elif name not in frame[2]:
                frame[2].append(name)


def _renamed(module: str, model_module: str, own_module: str) -> str:
    """The sibling's module in place of the model's, where the call is made in that module or one below it."""
    return own_module + module.removeprefix(model_module) if module.startswith(model_module) else module
