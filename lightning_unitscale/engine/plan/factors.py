"""A constant with its cause: what `Plan.explain` shows, recorded where the constant is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, isclose, log, prod

ROUNDING = 1e-12  # relative; constants that differ by less are the same number


@dataclass(frozen=True)
class Factor:
    """One factor of a multiplier.

    Attributes:
        value: what it multiplies by.
        cause: the rule and the numbers that went into it, such as "fan_in^-½, fan_in = 256".
        source: where the rule comes from: paper and section, or the model's own code.
    """

    value: float
    cause: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.value:.4g}: {self.cause}" + (f" ({self.source})" if self.source else "")


def to_unit_scale(rms: float) -> Factor:
    """What brings an initial value to RMS 1."""
    return Factor(1 / rms, f"1 / initial RMS {rms:.4g}: U has RMS 1")


def inverse(constant: float, cause: str, source: str = "") -> list[Factor]:
    """The factor that takes a constant out; none for 1."""
    return [] if constant == 1.0 else [Factor(1 / constant, f"1 / {constant:.4g}: {cause}", source)]


def product(factors: Iterable[Factor]) -> float:
    """The number that the factors make."""
    return prod((factor.value for factor in factors), start=1.0)


def geometric_mean(numbers: Iterable[float]) -> float:
    """Of the multipliers that one weight has in its several calls; exact when they are all equal."""
    numbers = list(numbers)
    if all(isclose(number, numbers[0], rel_tol=1e-12) for number in numbers):
        return numbers[0]
    return exp(sum(log(number) for number in numbers) / len(numbers))


def averaged(calls: Sequence[Sequence[Factor]]) -> list[Factor]:
    """The factors of a weight that is called several times: for each cause, the geometric mean over the calls.

    The product of the means is the mean of the products.
    """
    if all(list(factors) == list(calls[0]) for factors in calls):
        return list(calls[0])
    causes = dict.fromkeys((factor.cause, factor.source) for factors in calls for factor in factors)
    result = []
    for cause, source in causes:
        values = [product(f for f in factors if (f.cause, f.source) == (cause, source)) for factors in calls]
        mean = geometric_mean(values)
        same = all(isclose(value, mean, rel_tol=1e-12) for value in values)
        result.append(Factor(mean, cause if same else f"{cause}; mean of {len(calls)} calls", source))
    return result
