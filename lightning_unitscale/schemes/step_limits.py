"""The drop-in rule: what one step of the user's learning rate does stays of the size it had.

Under `lr_units="standard"` a scheme's rates are proportions that were found on some model. On the recorded batch it is
known what they do here (`engine.checks.first_step`): with M = Σ lr·|g| over the weights, by which the loss falls to
first order, and c the share of that which curvature takes away from a trial step of the same predicted fall,

    r = M(plan) / M(untouched)                    what a step does
    k = r · c(plan) / c(untouched)                what of it is lost again: 1/k is how much larger a rate may be

    r and k at most 8, r at least 1, unless that takes more than 4 times the rate

If r is too large, the roles that do most are reduced, to one common level: max Σ_role min(M_role, level). If it is too
small, all rates rise alike. Where the untouched model's trial step raises the loss, its gradients say nothing about a
step of that size (they vanish, or explode): there is nothing to compare with, and rates stay as they are.

SGD: the same with M = Σ lr·g² and r alone. Factors are rounded to a sixteenth of an octave, so that weights
share a learning rate, and so that the rounding of either storage makes no other plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import log2

from lightning_unitscale.engine.checks.first_step import FirstStep
from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.engine.plan.parameter_plan import ParameterPlan
from lightning_unitscale.engine.plan.plan import Plan

LARGEST = 8.0  # r and k: language models, which gain by it, have 7 to 8
MOST_RAISED = 4.0
_LEAST_LOST = 0.02  # a share that is smaller is not told from rounding and higher orders
SOURCE = "the first batch, see schemes/step_limits.py"


def limited_roles() -> tuple[str, ...]:
    """The roles whose rates are limited: those of weights that gradients of a batch reach as a whole."""
    return ("hidden", "readout", "embedding")


def limited(plan: Plan) -> dict[str, ParameterPlan]:
    """The weights whose rates are limited."""
    return {p.name: p for p in plan.parameters.values() if p.role in limited_roles() and not p.reason}


def limit_steps(plan: Plan, untouched: FirstStep, scaled: FirstStep) -> None:
    """Put the limits into a plan whose `step_limit`s are 1."""
    weights = limited(plan)
    adam = plan.step_scales("adam", decoupled_decay=True)
    sgd = plan.step_scales("sgd", decoupled_decay=True)
    largest = LARGEST
    if untouched.lost > 1:
        plan.notes.append(
            "no rate was limited: a trial step raises the loss of the untouched model, so there is no step to keep to"
        )
        return
    largest = LARGEST / max(1.0, max(scaled.lost, _LEAST_LOST) / max(untouched.lost, _LEAST_LOST))
    _set(
        "step_limit",
        weights,
        _by_role(weights.values(), {name: adam[name].lr * move for name, move in scaled.moves.items()}),
        sum(untouched.moves.values()),
        largest,
    )
    _set(
        "sgd_step_limit",
        weights,
        _by_role(weights.values(), {name: sgd[name].lr * move for name, move in scaled.squares.items()}),
        sum(untouched.squares.values()),
        LARGEST,
    )


def role_factors(plan: Mapping[str, float], untouched: float, largest: float) -> dict[str, float]:
    """The factor on each role's rates.

    Args:
        plan: by role, what a step does under the plan.
        untouched: what a step of the untouched model does.
        largest: how many times that the sum may be.
    """
    total = sum(plan.values())
    if not untouched or not total:
        return dict.fromkeys(plan, 1.0)
    if total < untouched:
        return dict.fromkeys(plan, min(untouched / total, MOST_RAISED))
    if total <= largest * untouched:
        return dict.fromkeys(plan, 1.0)
    level = _level(sorted(plan.values()), largest * untouched)
    return {role: min(1.0, level / share) if share else 1.0 for role, share in plan.items()}


def _level(shares: list[float], total: float) -> float:
    """The level at which shares, in rising order, must be cut off to sum to `total`."""
    for index, share in enumerate(shares):
        level = total / (len(shares) - index)
        if share >= level:
            return level
        total -= share
    return shares[-1]


def _by_role(weights: Iterable[ParameterPlan], moves: Mapping[str, float]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for weight in weights:
        sums[weight.role] = sums.get(weight.role, 0.0) + moves.get(weight.name, 0.0)
    return sums


def _set(
    constant: str, weights: Mapping[str, ParameterPlan], plan: Mapping[str, float], untouched: float, largest: float
) -> None:
    for role, factor in role_factors(plan, untouched, largest).items():
        rounded = float(2 ** (round(16 * log2(factor)) / 16))
        if rounded == 1.0:
            continue
        total = sum(plan.values()) / untouched
        cause = (
            f"a step by {role}s would change the loss {plan[role] / untouched:.3g} times as much as one of the whole "
            f"untouched model does, all weights {total:.3g} times: "
            + (f"limited to {largest:.3g} in sum" if factor < 1 else f"raised, at most {MOST_RAISED:g} times")
        )
        for weight in weights.values():
            if weight.role == role:
                weight.set_constant(constant, [Factor(rounded, cause, SOURCE)])
