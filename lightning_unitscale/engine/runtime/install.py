"""Put a plan in force: rescale the stored weights, and put scopes where something stays explicit.

Scopes (see `engine.runtime.interceptor`) go on the methods in which a factor is explicit or an operand is cast. Nothing is
installed where every factor is folded and nothing is cast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_unitscale.engine.plan.plan import EVERY_CALL, Plan, Site, Use
from lightning_unitscale.engine.runtime.casts import CastSite, WeightCast, cast_sites
from lightning_unitscale.engine.runtime.interceptor import Met, Rules, ScopedForward

STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def rescale_parameters(module: nn.Module, plan: Plan) -> None:
    """Bring untouched parameters to what the plan stores, in place: S = W · initial_factor · stored."""
    named = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in plan.parameters.items():
            factor = 1.0 if parameter.fixed else parameter.initial_factor * parameter.stored
            if factor != 1.0:
                named[name].mul_(factor)


def restore_parameters(module: nn.Module, before: Plan, after: Plan) -> None:
    """Bring parameters from what one plan stores to what another stores of the same function, in place."""
    named = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in before.parameters.items():
            factor = after.parameters[name].stored / parameter.stored
            if factor != 1.0:
                named[name].mul_(factor)


def install(module: nn.Module, plan: Plan) -> None:
    """Put a scope on every method in which a factor of the plan is explicit or an operand is cast."""
    explicit, casts = plan.explicit_sites, cast_sites(plan.sites)
    factors = {
        (key, site.op): factor
        for site in explicit
        if site.ordinal is None
        for key, factor in site.factors.items()
        if factor != 1.0
    }
    free = [site for site in plan.sites if site.ordinal is not None and (site.factors[""] != 1.0 or site.format)]
    uses = [*factors, *(use for use, cast in casts.items() if isinstance(cast, WeightCast))]
    if not uses and not free:
        return
    rules = Rules(factors, casts, plan.followed if uses else [], sorted({s.op for s in free} - {"output"}))
    keys_in_use = {key for key, _ in uses}
    tracked = {name for key in keys_in_use for name in key.split("+")}
    modules = dict(module.named_modules())
    enclosing = _fused_frames(uses, free, modules) | _enclosing_frames(plan, uses, modules)
    for where, method, keys in [*_scoped_frames(plan, modules), *((*frame, keys) for frame, keys in enclosing.items())]:
        own = modules[where]
        touched = [key for key in keys if key in tracked]
        sites = [site for site in free if site.module == where and site.method == method]
        in_use = touched or sites or keys_in_use.intersection(keys)
        if in_use or free or (where, method) in enclosing:
            scope = own.__dict__.get(method)
            if not isinstance(scope, ScopedForward):
                scope = ScopedForward(own, method, rules)
                setattr(own, method, scope)
            for key in touched:
                owner, _, attribute = key.rpartition(".")
                scope.touched.append((modules[owner], attribute, key))
            for site in sites:
                if site.op == "output":
                    scope.output_factor = site.factors[""]
                else:
                    assert site.ordinal is not None
                    scope.sites[site.op, site.ordinal] = site
                    if site.ordinal != EVERY_CALL:
                        scope.most_calls[site.op] = site.calls_in_frame


def rules_in_force(module: nn.Module) -> Rules | None:
    """The rules that the scopes of a prepared module share, if it has any."""
    for child in module.modules():
        for scope in child.__dict__.values():
            if isinstance(scope, ScopedForward):
                return scope.rules
    return None


def casts_in_force(module: nn.Module) -> dict[Use, CastSite]:
    """The cast sites of a prepared module."""
    rules = rules_in_force(module)
    return rules.casts if rules is not None else {}


@contextmanager
def watching_factors(module: nn.Module) -> Iterator[Met]:
    """What is applied inside: uses of parameters, and names of parameter-free sites."""
    met = Met()
    rules = rules_in_force(module)
    if rules is not None:
        rules.met = met
    try:
        yield met
    finally:
        if rules is not None:
            rules.met = None


def _scoped_frames(plan: Plan, modules: dict[str, nn.Module]) -> list[tuple[str, str, list[str]]]:
    """The plan's frames; a method other than `forward` brings the module's other steps along, seen or not."""
    frames = {(where, method): list(keys) for where, method, keys in plan.frames if method != "<hook>"}
    for (where, method), keys in list(frames.items()):
        if method in STEPS and keys:
            for other in STEPS:
                if other != method and callable(getattr(type(modules[where]), other, None)):
                    known = frames.setdefault((where, other), [])
                    known.extend(key for key in keys if key not in known)
    return [(where, method, keys) for (where, method), keys in frames.items()]


def _enclosing_frames(plan: Plan, uses: list[Use], modules: dict[str, nn.Module]) -> dict[tuple[str, str], list[str]]:
    """Frames in which a weight computed from parameters is both made and used, with the names of those parameters.

    A property makes it on access, a hook of the module that uses it just before that module's own frame opens.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for key, _ in uses:
        if key not in plan.parameters or plan.parameters[key].fixed:
            path = key.split("+")[0].split(".")[:-1]
            for length in range(len(path) + 1):
                where = ".".join(path[:length])
                for method in STEPS if not where else ("forward",):
                    has_method = getattr(type(modules[where]), method, nn.Module.forward) is not nn.Module.forward
                    if has_method:
                        names = found.setdefault((where, method), [])
                        names.extend(name for name in key.split("+") if name not in names)
    return found


def _fused_frames(uses: list[Use], free: list[Site], modules: dict[str, nn.Module]) -> dict[tuple[str, str], list[str]]:
    """Layers of torch that in evaluation run as one kernel, past everything inside, unless a function mode is on."""
    inside = {*(name for key, _ in uses for name in key.split("+")), *(f"{site.module}." for site in free)}
    return {
        (where, "forward"): []
        for where, module in modules.items()
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
        and any(name.startswith(f"{where}." if where else "") for name in inside)
    }


def uninstall(module: nn.Module) -> None:
    """Take every scope off again."""
    for child in module.modules():
        for method, scope in list(child.__dict__.items()):
            if isinstance(scope, ScopedForward):
                if scope.replaced is None:
                    delattr(child, method)
                else:
                    setattr(child, method, scope.replaced)
