"""How coordinates grow: the slope of log2 of their mean over seeds against log2 of the size, by least squares.

A module passes where its start does not grow (slope ≤ tolerance), and its change neither grows nor vanishes
(|slope| ≤ tolerance). The start may fall: a readout of 1 / fan_in begins with outputs of width^-½. Against depth the
change may fall too, of all but the model's output: in a deep model each branch does less.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from lightning_unitscale.cookbook.coordinates.measure import Coordinate

Series = tuple[str, str, str, str]  # scheme, knob, speed, module
Sizes = Mapping[int, tuple[float, float]]  # mean start and change, by size


@dataclass(frozen=True)
class CoordinateSlopes:
    """Of one module.

    Attributes:
        start, change: exponents; infinite where a value is not finite, NaN where all are zero.
    """

    start: float
    change: float

    def passes(self, tolerance: float, *, may_fall: bool = False) -> bool:
        """Whether both are what they should be; what is always zero, or never changes, has no slope to judge."""
        grows = self.start > tolerance or self.change > tolerance
        vanishes = self.change < -tolerance and not may_fall
        return not grows and not vanishes


def by_module(coordinates: Iterable[Coordinate]) -> dict[Series, Sizes]:
    """Means over seeds and over layers of one kind: `layers.0.mlp` and `layers.1.mlp` are `layers.*.mlp`."""
    found: dict[Series, dict[int, list[Coordinate]]] = defaultdict(lambda: defaultdict(list))
    for item in coordinates:
        module = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", item.module)
        place = item.place
        found[place.scheme, place.knob, place.speed, module][place.size].append(item)
    return {
        series: {size: (fmean(i.start for i in items), fmean(i.change for i in items)) for size, items in sizes.items()}
        for series, sizes in found.items()
    }


def failing(found: Mapping[Series, Sizes], tolerance: float) -> set[Series]:
    """The modules that don't pass. The last module that returns in a model's step is its output."""
    output = {series[:3]: series for series in found}
    return {
        series
        for series, sizes in found.items()
        if not slopes(sizes).passes(tolerance, may_fall=series[1] == "depth" and series != output[series[:3]])
    }


def slopes(sizes: Sizes) -> CoordinateSlopes:
    """The two exponents of one module."""
    at = sorted(sizes)
    return CoordinateSlopes(*(exponent(at, [sizes[size][which] for size in at]) for which in (0, 1)))


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """b of values ≈ a · size^b; infinite where a value is not finite, NaN with less than two that are not zero."""
    if not all(map(math.isfinite, values)):
        return math.inf
    points = [(math.log2(size), math.log2(value)) for size, value in zip(sizes, values, strict=True) if value > 0]
    if len(points) < 2:
        return math.nan
    x_mean, y_mean = (fmean(axis) for axis in zip(*points, strict=True))
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)
