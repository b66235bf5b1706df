"""The drop-in rule: what one step of the user's learning rate does stays of the size it had.

Under `lr_units="standard"` a scheme's rates are proportions that were found on some model. On the recorded batch it is
known what they do here (`engine.checks.first_step`): with M = Σ lr·|g| over the weights, by which the loss falls to
first order, and c the share of that which curvature takes away from a trial step of the same predicted fall, at
least 0.1,

    r = M(plan) / M(untouched)                    what a step does
    k = r · c(plan) / c(untouched)                what of it is lost again: 1/k is how much larger a rate may be

    r and k at most 8, r at least 1, unless that takes more than 4 times the rates

If r is too large, the roles that do most are reduced, to one common level: max Σ_role min(M_role, level). If it is too
small, all rates rise alike, those of a role not so far that at Adam's default rate, 1e-3, a step would be larger than
the weight. Where the untouched model's trial step raises the loss, its gradients say nothing about a step of that size
(they vanish, or explode): there is nothing to compare with, and rates stay as they are.

SGD: the same with M = Σ lr·g² and r alone. Factors are rounded to a sixteenth of an octave, so that weights
share a learning rate, and so that the rounding of either storage makes no other plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor, log2

from lightning_unitscale.engine.checks.first_step import FirstStep
from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.engine.plan.parameter_plan import ParameterPlan
from lightning_unitscale.engine.plan.plan import Plan

LARGEST = 8.0  # r and k: language models, which gain by it, have 7 to 8
MOST_RAISED = 4.0
DEFAULT_RATE = 1e-3  # of torch.optim.Adam
_LEAST_LOST = 0.1  # of a smaller share it is not known how it grows with the step
_ROLES = ("hidden", "readout", "embedding")
LIMITS = {"adam": "step_limit", "sgd": "sgd_step_limit"}
SOURCE = "the first batch, see schemes/step_limits.py"


def limited(plan: Plan) -> dict[str, ParameterPlan]:
    """The weights whose rates are limited: those that gradients of a batch reach as a whole, with no rate set."""
    return {p.name: p for p in plan.parameters.values() if p.role in _ROLES and not p.reason and p.lr_override is None}


def limit_steps(plan: Plan, untouched: FirstStep, scaled: FirstStep) -> None:
    """Put the limits into a plan whose `step_limit`s are 1."""
    if untouched.lost > 1:
        plan.notes.append(
            "no rate was limited: a trial step raises the loss of the untouched model, so there is no step to keep to"
        )
        return
    more_curved = max(scaled.lost, _LEAST_LOST) / max(untouched.lost, _LEAST_LOST)
    _limit(plan, "adam", untouched.moves, scaled.moves, LARGEST / max(1.0, more_curved))
    _limit(plan, "sgd", untouched.squares, scaled.squares, LARGEST)


def _limit(
    plan: Plan, family: str, untouched: Mapping[str, float], scaled: Mapping[str, float], largest: float
) -> None:
    weights = limited(plan)
    scales = plan.step_scales(family, decoupled_decay=True)
    moves: dict[str, float] = {}
    for name, weight in weights.items():
        moves[weight.role] = moves.get(weight.role, 0.0) + scales[name].lr * scaled.get(name, 0.0)
    before = sum(untouched.values())
    for role, factor in role_factors(moves, before, largest).items():
        if factor > 1 and family == "adam":
            relative = max(scales[name].lr / weight.stored for name, weight in weights.items() if weight.role == role)
            factor = max(1.0, min(factor, 2 ** (floor(-16 * log2(DEFAULT_RATE * relative)) / 16)))
        rounded = float(2 ** (round(16 * log2(factor)) / 16))
        if rounded == 1.0:
            continue
        cause = (
            f"a step of {role} weights would change the loss by {moves[role] / before:.3g} times, all weights "
            f"by {sum(moves.values()) / before:.3g} times what one of the untouched model does: "
            + (f"limited to {largest:.3g}" if factor < 1 else "raised to 1, or as far as that may go")
        )
        for weight in weights.values():
            if weight.role == role:
                weight.set_constant(LIMITS[family], [Factor(rounded, cause, SOURCE)])


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
