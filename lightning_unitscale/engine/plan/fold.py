"""Decide where each constant is kept: stored in the weights, or explicit in the forward pass.

    wanted(use)   = the site's multiplier; in "folded" storage × every foldable factor of a neighbour
                    (attention logits into the query weight, an activation's constant into the next weight)
    stored(param) = wanted(its primary use) in "folded" storage, 1 in "unit" storage (its own multiplier where a
                    hand-written autograd.Function uses it: the backward pass there would not see a factor)
    explicit(use) = wanted(use) / stored(param)

A tied weight with two different factors keeps the one of its primary use; the other use stays a site.
"""

from __future__ import annotations

from math import isclose

from lightning_unitscale.engine.plan.factors import ROUNDING
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.record.keys import UseId


def resolve(plan: Plan, storage: str) -> None:
    """Set `stored` of every parameter and `factors`/`folded` of every site for the given storage, in place."""
    plan.storage = storage
    unfolded = {UseId(key, site.op): factor for site in plan.sites for key, factor in site.multipliers.items()}
    folded = dict(unfolded)
    for site in plan.sites:
        if site.ordinal is not None:
            for neighbour in () if site.beside else site.fold_into:
                folded[neighbour] *= site.multiplier
            fold = storage == "folded" and bool(site.fold_into)
            site.factors = {"": 1.0 if fold else site.multiplier}
            site.folded = site.factors[""] == 1.0
    wanted = folded if storage == "folded" else unfolded
    for name, parameter in plan.parameters.items():
        use = primary_use_of(plan, name)
        if use is not None and not parameter.fixed:
            parameter.multiplier = folded[use]
            parameter.stored = wanted[use] if storage == "folded" or parameter.stored_whole else 1.0
    for site in plan.sites:
        if site.ordinal is None:
            site.factors = {key: _explicit(plan, key, wanted[UseId(key, site.op)]) for key in site.multipliers}
            site.folded = all(factor == 1.0 for factor in site.factors.values())


def primary_use_of(plan: Plan, name: str) -> UseId | None:
    """The use of a parameter that its role speaks of."""
    uses = [site for site in plan.sites if name in site.multipliers]
    if not uses:
        return None
    role = plan.parameters[name].role
    best = next((site for site in uses if site.role == role), uses[0])
    return UseId(name, best.op)


def _explicit(plan: Plan, key: str, wanted: float) -> float:
    parameter = plan.parameters.get(key)
    stored = 1.0 if parameter is None or parameter.fixed else parameter.stored
    factor = wanted / stored
    return 1.0 if isclose(factor, 1.0, rel_tol=ROUNDING) else factor


def folded_copy(plan: Plan) -> Plan:
    """The same plan in folded storage."""
    copy = Plan.from_dict(plan.to_dict())
    resolve(copy, "folded")
    return copy
