"""Independent search, u-μP's way to hyperparameters that do not depend on one another, and random search beside it.

    rate        the learning rate alone, all else at its default
    alone       each other setting alone, at the best learning rate
    combined    the best of each, together

costs the sum of the numbers of values, not their product (u-μP, arXiv 2407.17465, section 4.2). What is chosen is the
best of all runs: the best of each need not be best together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_unitscale.cookbook.sweeps.space import Point, Space, random_points
from lightning_unitscale.errors import InputError

Losses = dict[Point, float]  # held-out, means over seeds
Evaluate = Callable[[str, Iterable[Point]], Losses]  # the phase, and the points to run


@dataclass(frozen=True)
class SearchRun:
    """One training run: what phase of the search it is for, its settings, its seed."""

    phase: str
    point: Point
    seed: int

    def __str__(self) -> str:
        return f"{self.phase:8} {shown(self.point)}, seed {self.seed}"

    def to_row(self) -> dict[str, Any]:
        """Its part of the line in `runs.jsonl`."""
        return asdict(self) | {"point": dict(self.point)}


def independent_search(space: Space, rate: str, default: Mapping[str, Any], evaluate: Evaluate) -> Losses:
    """All points that were run, with their losses.

    Args:
        rate: the setting that is the learning rate.
        default: what each setting has where it is not tried.

    Raises:
        InputError: no learning rate trains; nothing else was run.
    """
    start = tuple((name, default[name]) for name in space)
    rates = [_replaced(start, rate, value) for value in space[rate]]
    losses = dict(evaluate("rate", rates))
    if not any(math.isfinite(loss) for loss in losses.values()):
        raise InputError(
            f"params: with none of {rate}={','.join(map(str, space[rate]))} does the model train; its held-out loss is "
            "not finite. Give smaller learning rates."
        )
    best = best_of(losses)
    alone = {name: [_replaced(best, name, v) for v in space[name]] for name in space if name != rate}
    losses |= evaluate("alone", (point for points in alone.values() for point in points if point not in losses))
    combined = best
    for name, points in alone.items():
        winner = min([best, *points], key=lambda point: losses[point])
        combined = _replaced(combined, name, dict(winner)[name])
    return losses | evaluate("combined", [combined])


def cost(space: Space) -> int:
    """How many points independent search runs, if the best of each setting is not the default."""
    return sum(map(len, space.values())) - (len(space) - 1) + 1


def random_search(space: Space, seed: int, evaluate: Evaluate) -> Losses:
    """As many points of the same grid, drawn at random."""
    return evaluate("random", random_points(space, cost(space), seed))


def best_of(losses: Losses) -> Point:
    """The point with the smallest loss."""
    return min(losses, key=losses.__getitem__)


def shown(point: Point) -> str:
    """A point as overrides, without the paths before the names."""
    return ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in point)


def _replaced(point: Point, name: str, value: Any) -> Point:
    return tuple((known, value if known == name else old) for known, old in point)
