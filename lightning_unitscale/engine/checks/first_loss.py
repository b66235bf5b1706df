"""The gate of the first loss: under the plan it may not be far above the untouched model's.

A scheme changes the function that a model begins as, and where the model's own scales are what its code was made for (a
coordinate update drawn with a tiny gain, a periodic activation, a codebook), the changed function may be one that no
learning rate mends. The same step, before and after, shows it:

    loss(plan) ≤ 1.5 · |loss(untouched)| + 0.1        and finite

(guessing among many classes is worse than the untouched model's by less: logits of RMS 1 cost ½ nat of 4 or more).
Where a scheme can let outputs begin smaller (`Scheme.begins_smaller`), that is tried first, without a word: the plan is
still the scheme's, and names the hyperparameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from torch import nn

from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.options import Options
from lightning_unitscale.warn_user import warn_user

LARGEST_RATIO = 1.5
_SMALL = 0.1  # losses that may be near 0, or of either sign
_LOUD = 4.0  # an output that the plan means to have RMS 1


def is_far_above(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether one of a step's losses is, under the plan, not finite or far above what it was."""
    return any(
        not isfinite(ours) or ours > LARGEST_RATIO * abs(theirs) + _SMALL
        for theirs, ours in zip(before, after, strict=False)
    )


def loudest_sites(plan: Plan) -> list[str]:
    """Modules of scaled matmuls whose outputs are too large or not finite, larger than the untouched model's."""
    found: dict[str, float] = {}
    for site in plan.sites:
        ours, theirs = site.rms_after.get("output", 0.0), site.rms_before.get("output", 0.0)
        if site.params and not site.reason and not (ours <= max(_LOUD, theirs)):  # NaN too
            found[site.module] = max(found.get(site.module, 0.0), ours if isfinite(ours) else float("inf"))
    return sorted(found, key=lambda module: -found[module])


def with_less(module: nn.Module, plan: Plan, options: Options, losses: Mapping[str, Any]) -> Options:
    """Options for a plan that leaves alone what made the first loss too large.

    Raises:
        UnitScalingError: with lr_units="umup" a model that is left alone has no learning rate.

    Warns:
        of what is left alone.
    """
    found = (
        f"under scheme={plan.scheme!r} the first loss of {type(module).__name__} is {_numbers(losses['after'])}, that "
        f"of the untouched model {_numbers(losses['before'])}"
    )
    sites = [name for name in losses["sites"] if name]
    named = f"{', '.join(sites[:5])}{' …' if len(sites) > 5 else ''}"
    seen = f"outputs far above RMS 1: {named}" if sites else "no output of one matmul is far above RMS 1"
    if plan.lr_units != "standard":
        way_out = "List those in skip, or use" if sites else "Use"
        raise UnitScalingError(f"{found}; {seen}. {way_out} scheme='preserve' with an ordinary learning rate.")
    scaled = {site.module for site in plan.sites if site.params and not site.reason}
    if sites and not scaled <= set(sites):
        less, left = replace(options, skip=(*options.skip, *sites)), named
    else:
        less, left = (
            replace(options, scheme="preserve", hyperparameters={}),
            "the whole model, which trains as if untouched",
        )
    warn_user(f"unit scaling: {found}; {seen}. Left alone: {left}.")
    return less


def _numbers(losses: list[float]) -> str:
    return ", ".join(f"{loss:.4g}" for loss in losses)
