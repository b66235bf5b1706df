"""The gate: before the first optimizer step, check that the plan does what it says.

Where the scheme changes nothing (`preserve`), the rehearsed loss must equal the untouched model's bit for bit, and
where its factors undo each other, but for rounding. For the
other schemes every explicit factor must have been applied somewhere in the step, and the operands of every matmul with
a parameter are measured under the plan, as they are in unit storage:

    x: RMS · (constants of activations folded into the weight)        weight: RMS / stored

and the share of them within a factor of 2 and of 4 of RMS 1 goes into the plan; a low share is a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isclose, isfinite, log2

from torch import nn

from lightning_unitscale.engine.analysis.structure import Structure
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.engine.record.trace import Trace, Value
from lightning_unitscale.engine.runtime.install import watching_factors
from lightning_unitscale.engine.runtime.rules import AppliedFactors
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.ops import MATMULS, is_lookup
from lightning_unitscale.warn_user import warn_user

LOW_SHARE = 0.75
KEPT = 0.02  # of the loss; a narrow dtype rounds scaled weights to other numbers
OPERANDS = ("x", "weight")


def verify(module: nn.Module, plan: Plan, before: Trace, rehearse: Callable[[], Trace]) -> Trace:
    """Check a plan just put in force; fills `rms_after` of its sites, and returns the step as it is now.

    Args:
        before: the step as the untouched model took it.
        rehearse: takes the same step again on the prepared model.

    Raises:
        UnitScalingError: a scheme that changes nothing changed the loss, or a factor of the plan was not applied.
    """
    with watching_factors(module) as applied:
        after = rehearse()
    missed = _not_applied(plan, before, applied)
    if missed:
        raise UnitScalingError(
            f"{type(module).__name__}: {len(missed)} factors of the plan were not applied in a second run of the same "
            f"step: {', '.join(missed[:3])}{' …' if len(missed) > 3 else ''}. Their weights are made or used where "
            "they cannot be followed; list them in skip and start from a newly built model."
        )
    if not plan.changes_training:
        if after.loss_numbers != before.loss_numbers:
            raise UnitScalingError(
                f"{type(module).__name__}: the same step gave the loss {before.loss_numbers} and then "
                f"{after.loss_numbers}, though scheme={plan.scheme!r} changes nothing. The step depends on something "
                "the rehearsal cannot put back (a file, a global, a data iterator); pass verify=False if that is meant."
            )
        return after
    _measure(plan, after)
    if plan.keeps_function:
        _check_kept(module, plan, before, after)
        return after
    if not all(map(isfinite, after.loss_numbers)):
        return after
    share = operand_share(plan, 4.0)
    if share < LOW_SHARE:
        worst = ", ".join(f"{name} {operand}: RMS {rms:.2g}" for rms, name, operand in worst_operands(plan)[:3])
        warn_user(
            f"unit scaling: only {share:.0%} of the matmul operands of {type(module).__name__} have an RMS within a "
            f"factor 4 of 1 under the plan; the furthest off: {worst}."
        )
    return after


def _check_kept(module: nn.Module, plan: Plan, before: Trace, after: Trace) -> None:
    for was, now in zip(before.loss_numbers, after.loss_numbers, strict=True):
        if not isclose(was, now, rel_tol=KEPT, abs_tol=KEPT):
            raise UnitScalingError(
                f"{type(module).__name__}: the same step gave the loss {was:.6g} and then {now:.6g}, though "
                f"scheme={plan.scheme!r} is to keep the function. A factor is not undone where the weight or "
                "activation it stands on is used; find it with skip, and leave that module out."
            )


def _not_applied(plan: Plan, before: Trace, applied: AppliedFactors) -> list[str]:
    """The sites that this process's step called (another's may have made the plan), but whose factor no call got."""
    uses = {UseId(value.key, call.name) for call in before.calls for value in call.inputs if value.parameters}
    places = {call.place for call in before.calls if call.frame}
    places |= {place.at_every_call for place in places}
    missed = []
    for site in plan.explicit_sites:
        if site.ordinal is None:
            factors = [UseId(key, site.op) for key, factor in site.factors.items() if factor != 1.0]
            missed += [f"{site.name} ({use.key})" for use in factors if use in uses and use not in applied]
        elif site.place in places and site.place not in applied:
            missed.append(site.name)
    return missed


def operand_share(plan: Plan, factor: float, operands: tuple[str, ...] = OPERANDS) -> float:
    """Share of the measured matmul operands whose RMS lies in [1/factor, factor] under the plan."""
    found = [rms for _, _, rms in _operands(plan, operands)]
    return sum(1 / factor <= rms <= factor for rms in found) / len(found) if found else 1.0


def worst_operands(plan: Plan) -> list[tuple[float, str, str]]:
    """(RMS, site, operand) under the plan, furthest from 1 first."""
    found = [(rms, site.name, operand) for site, operand, rms in _operands(plan, OPERANDS)]
    return sorted(found, key=lambda item: -abs(log2(item[0])))


def _operands(plan: Plan, operands: tuple[str, ...]) -> Iterator[tuple[Site, str, float]]:
    for site in plan.sites:
        for operand in operands:
            if site.rms_after.get(operand, 0.0) > 0:
                yield site, operand, site.rms_after[operand]


def _measure(plan: Plan, trace: Trace) -> None:
    structure = Structure(trace)
    seen: dict[tuple[str, bool], dict[str, float]] = {}
    for call in structure.sites:
        weights = structure.weights_of(call)
        factors = MATMULS[call.name].multiplicands(call).values()
        moving = [v for v in factors if isinstance(v, Value) and v.is_float and not v.parameters]
        for value in weights:
            use = value.key, is_lookup(call.name)
            if use not in seen and value.rms is not None:
                seen[use] = {"weight": value.rms}
                if moving and moving[0].rms is not None:
                    seen[use]["x"] = moving[0].rms
                if call.output.rms is not None:
                    seen[use]["output"] = call.output.rms
    for site in plan.sites:
        key = site.params[0] if site.params else ""
        measured = seen.get((key, is_lookup(site.op)))
        if measured is not None and not site.reason:
            site.rms_after = dict(measured)
            if key in plan.parameters and plan.parameters[key].stored:
                site.rms_after["weight"] = trace.facts[key].rms / abs(plan.parameters[key].stored)
            if "x" in site.rms_after:
                site.rms_after["x"] *= _folded_activations(plan, key, site.op)


def _folded_activations(plan: Plan, key: str, op: str) -> float:
    product = 1.0
    for site in plan.sites:
        if (
            site.role == "activation"
            and not site.beside
            and site.factors.get("") == 1.0
            and UseId(key, op) in site.fold_into
        ):
            product *= site.multiplier
    return product
