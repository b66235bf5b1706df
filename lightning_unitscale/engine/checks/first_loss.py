"""The gate of the first loss: under the plan it may not be far above the untouched model's.

A scheme changes the function that a model begins as, and where the model's own scales are what its code was made for (a
coordinate update drawn with a tiny gain, a periodic activation, a codebook), the changed function may be one that no
learning rate mends. The same step, before and after, shows it:

    loss(plan) ≤ 1.5 · |loss(untouched)| + 0.1        and finite

(guessing among many classes is worse than the untouched model's by less: logits of RMS 1 cost ½ nat of 4 or more).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from lightning_unitscale.engine.plan.plan import Plan

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
