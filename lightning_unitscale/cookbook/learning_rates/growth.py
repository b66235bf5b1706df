"""Where a grid of learning rates has to go on: the best at its edge may lie outside."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_unitscale.cookbook.learning_rates.findings import best_of, losses_of
from lightning_unitscale.cookbook.learning_rates.grid import RateRun
from lightning_unitscale.cookbook.sweeps.results import Result


def rate_beyond(results: Sequence[Result[RateRun]], parametrization: str, value: int | str) -> float | None:
    """The next rate beyond the edge at which the best is; None where it is inside, or where nothing trained."""
    best, tried = best_of(results, parametrization, value), losses_of(results, parametrization, value)
    if best is None or not best.at_edge or not math.isfinite(best.loss):
        return None
    return best.learning_rate * (2 if best.learning_rate == max(tried) else 0.5)
