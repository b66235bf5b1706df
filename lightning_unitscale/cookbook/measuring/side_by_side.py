"""Times of several variants of one step, alternated, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence

MODES = ("eager", "compiled")


def time_side_by_side(steps: Mapping[str, Callable[[], float]], rounds: int, warm_up: int) -> dict[str, list[float]]:
    """In every round each variant takes one step, in a new order.

    Args:
        steps: by the variant's name; each takes one step and returns how long it took by its own clock.
        rounds: number of rounds that count.
        warm_up: number of rounds before them.

    Returns:
        For each variant one time a round, in the unit of its clock.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for number in range(-warm_up, rounds):
        for name in order.sample(list(steps), len(steps)):
            elapsed = steps[name]()
            if number >= 0:
                times[name].append(elapsed)
    return times


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Of two variants' times in the same round."""
    return [time / other for time, other in zip(times, others, strict=True)]


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
