"""Put a plan in force: rescale the stored weights, and put scopes where something stays explicit.

Scopes (see `engine.runtime.scoped_forward`) go on the methods in which a factor is explicit or an operand is cast.
Nothing is installed where every factor is folded and nothing is cast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.site import READING, Site
from lightning_unitscale.engine.record.keys import ParameterKey, UseId, is_parametrization
from lightning_unitscale.engine.record.places import EVERY_CALL, HOOK, Frame
from lightning_unitscale.engine.runtime.block_constants import block_constants
from lightning_unitscale.engine.runtime.casts import AttentionCast, CastSite, WeightCast, cast_sites
from lightning_unitscale.engine.runtime.placement import look_after, look_away
from lightning_unitscale.engine.runtime.rules import AppliedFactors, Rules
from lightning_unitscale.engine.runtime.scope import FreeSite
from lightning_unitscale.engine.runtime.scoped_forward import ScopedForward
from lightning_unitscale.errors import UnitScalingError

_BEFORE_SCRIPTING = "__prepare_scriptable__"  # TorchScript's own hook
_KeysByFrame = dict[Frame, list[ParameterKey]]
STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def rescale_parameters(module: nn.Module, plan: Plan) -> None:
    """Bring untouched parameters to what the plan stores, in place: S = W · initial_factor · stored."""
    named = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in plan.parameters.items():
            if parameter.from_initial != 1.0:
                named[name].mul_(parameter.from_initial)


def untouched_factors(plan: Plan) -> dict[str, float]:
    """What brings stored parameters back to their initial values, to rounding, by name, where it is not 1."""
    return {p.name: 1 / p.from_initial for p in plan.parameters.values() if p.from_initial not in (0.0, 1.0)}


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
        UseId(str(key), site.op): factor
        for site in explicit
        if site.ordinal is None
        for key, factor in site.factors.items()
        if factor != 1.0
    }
    free = [site for site in plan.sites if site.ordinal is not None and (site.factors[""] != 1.0 or site.format)]
    uses = [*factors, *(use for use, cast in casts.items() if isinstance(cast, WeightCast))]
    if not uses and not free:
        return
    residuals = [site for site in free if site.role == "residual"]  # the one role whose factor has the depth in it
    constants = block_constants(
        {site.place: site.factors[""] for site in residuals}, {site.place: site.name for site in residuals}
    )
    readings = {UseId(str(key), site.op) for site in explicit if site.role == READING for key in site.params}
    followed = plan.followed if uses else []
    free_ops = sorted({site.op for site in free} - {"output"})
    rules = Rules(factors, readings, casts, followed, plan.followed_with_others, free_ops)
    keys_in_use = {key for key, _ in uses}
    tracked = {name for key in keys_in_use for name in ParameterKey(key).names}
    modules = dict(module.named_modules())
    enclosing = _fused_frames(uses, free, modules) | _enclosing_frames(plan, uses, modules)
    for frame, keys in [*_scoped_frames(plan, modules).items(), *enclosing.items()]:
        touched = [key for key in keys if key in tracked]
        sites = [site for site in free if site.place.frame == frame]
        in_use = touched or sites or keys_in_use.intersection(keys)
        if in_use or free or frame in enclosing:
            scoped = modules[frame.module]
            scope = ScopedForward.behind(scoped.__dict__.get(frame.method))
            if scope is None:
                scope = ScopedForward(scoped, frame.method, rules, is_parametrization(frame.module))
                setattr(scoped, frame.method, scope.bound)
                scoped.__dict__[_BEFORE_SCRIPTING] = refuse_scripting
            for key in map(str, touched):
                owner, _, attribute = key.rpartition(".")
                scope.touched.append((modules[owner], attribute, rules.made_of[key]))
            for site in sites:
                if site.op == "output":
                    scope.output_site = site
                else:
                    assert site.ordinal is not None
                    cast = casts.get(site.use)
                    scope.sites[site.op, site.ordinal] = FreeSite(
                        site, cast if isinstance(cast, AttentionCast) else None, constants.get(site.place)
                    )
                    if site.ordinal != EVERY_CALL:
                        scope.most_calls[site.op] = site.calls_in_frame
    look_after(module)


def rules_in_force(module: nn.Module) -> Rules | None:
    """The rules that the scopes of a prepared module share, if it has any."""
    for child in module.modules():
        for value in child.__dict__.values():
            if scope := ScopedForward.behind(value):
                return scope.rules
    return None


def casts_in_force(module: nn.Module) -> dict[UseId, CastSite]:
    """The cast sites of a prepared module."""
    rules = rules_in_force(module)
    return rules.casts if rules is not None else {}


@contextmanager
def watching_factors(module: nn.Module) -> Iterator[AppliedFactors]:
    """The factors that are applied inside."""
    applied = AppliedFactors()
    rules = rules_in_force(module)
    if rules is not None:
        rules.applied = applied
    try:
        yield applied
    finally:
        if rules is not None:
            rules.applied = None


def _scoped_frames(plan: Plan, modules: dict[str, nn.Module]) -> _KeysByFrame:
    """The plan's frames; a method other than `forward` brings the module's other steps along, seen or not."""
    frames: _KeysByFrame = {known.frame: list(known.keys) for known in plan.frames if known.frame != HOOK}
    for (where, method), keys in list(frames.items()):
        if method in STEPS and keys:
            for other in STEPS:
                if other != method and callable(getattr(type(modules[where]), other, None)):
                    known = frames.setdefault(Frame(where, other), [])
                    known.extend(key for key in keys if key not in known)
    return frames


def _enclosing_frames(plan: Plan, uses: list[UseId], modules: dict[str, nn.Module]) -> _KeysByFrame:
    """Frames in which a weight computed from parameters is both made and used, with the names of those parameters.

    A property makes it on access, a hook of the module that uses it just before that module's own frame opens.
    """
    found: _KeysByFrame = {}
    for key, _ in uses:
        if key not in plan.parameters or plan.parameters[key].fixed:
            parameters = ParameterKey(key).names
            path = parameters[0].split(".")[:-1]
            for length in range(len(path) + 1):
                where = ".".join(path[:length])
                for method in STEPS if not where else ("forward",):
                    has_method = getattr(type(modules[where]), method, nn.Module.forward) is not nn.Module.forward
                    if has_method:
                        known = found.setdefault(Frame(where, method), [])
                        known.extend(ParameterKey(name) for name in parameters if name not in known)
    return found


def _fused_frames(uses: list[UseId], free: list[Site], modules: dict[str, nn.Module]) -> _KeysByFrame:
    """Layers of torch that in evaluation run as one kernel, past everything inside, unless a function mode is on."""
    inside = {*(name for key, _ in uses for name in ParameterKey(key).names), *(f"{site.module}." for site in free)}
    return {
        Frame(where, "forward"): []
        for where, module in modules.items()
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
        and any(name.startswith(f"{where}." if where else "") for name in inside)
    }


def refuse_scripting() -> None:
    """
    Raises:
        UnitScalingError: always; `torch.jit.script` asks it of each module, and reads the source of its methods then.
    """
    raise UnitScalingError(
        "torch.jit.script compiles the source of a module's methods, in which unit-scaling factors do not stand: its "
        "program would be another function. Use torch.export or torch.jit.trace, or remove_unit_scaling(model) first "
        "(unitscale export makes a plain model where that is refused)."
    )


def uninstall(module: nn.Module) -> None:
    """Take every scope off again."""
    look_away(module)
    for child in module.modules():
        child.__dict__.pop(_BEFORE_SCRIPTING, None)
        for method, value in list(child.__dict__.items()):
            if scope := ScopedForward.behind(value):
                if scope.replaced is None:
                    delattr(child, method)
                else:
                    setattr(child, method, scope.replaced)
