"""What a sweep of learning rates says: the best of each value, and which claims about unit scaling hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from omegaconf import DictConfig

from lightning_unitscale.cookbook.learning_rates.grid import RateRun, is_power_of_two, readable_rate
from lightning_unitscale.cookbook.sweeps.results import Result

DROP_IN_TOLERANCE = 0.1  # nats
BASELINES = ("standard", "fan-in")
GRIDS = (*BASELINES, "umup")


@dataclass(frozen=True)
class Best:
    """The best learning rate of one parametrization at one value of the axis, by the mean held-out loss of the seeds.

    Attributes:
        losses: of each seed at this learning rate.
        at_edge: it is the smallest or the largest that was tried, so the best may lie outside.
    """

    learning_rate: float
    losses: tuple[float, ...]
    at_edge: bool

    @property
    def loss(self) -> float:
        """The mean over the seeds."""
        return fmean(self.losses)

    @property
    def noise(self) -> float:
        """Half the range over the seeds; 0 with one seed."""
        return (max(self.losses) - min(self.losses)) / 2 if math.isfinite(self.loss) else 0.0


def losses_of(
    results: Sequence[Result[RateRun]], parametrization: str, value: int | str
) -> dict[float, tuple[float, ...]]:
    """Held-out losses of all seeds, by learning rate."""
    losses: dict[float, tuple[float, ...]] = {}
    for result in sorted(results, key=lambda result: (result.run.learning_rate, result.run.seed)):
        if (result.run.parametrization, result.run.value) == (parametrization, value):
            rate = result.run.learning_rate
            losses[rate] = (*losses.get(rate, ()), result.held_out)
    return losses


def best_of(results: Sequence[Result[RateRun]], parametrization: str, value: int | str) -> Best | None:
    """The best on the grid of powers of two; learning rates with fewer seeds than others don't take part."""
    losses = {rate: all_ for rate, all_ in losses_of(results, parametrization, value).items() if is_power_of_two(rate)}
    if not losses:
        return None
    seeds = max(map(len, losses.values()))
    rate = min((rate for rate in losses if len(losses[rate]) == seeds), key=lambda rate: fmean(losses[rate]))
    return Best(rate, losses[rate], at_edge=rate in (min(losses), max(losses)))


def better_baseline(results: Sequence[Result[RateRun]], value: int | str) -> Best | None:
    """The best of the models without unit scaling, at the better of their initialisations."""
    bests = [best for name in BASELINES if (best := best_of(results, name, value))]
    return min(bests, key=lambda best: best.loss) if bests else None


def findings(cfg: DictConfig, results: Sequence[Result[RateRun]]) -> Iterator[tuple[bool, str]]:
    """(whether it holds, the claim with its numbers), for each claim that the results can decide."""
    axis = cfg.sweep.axis
    grids = {
        name: {value: best for value in cfg.sweep.points if (best := best_of(results, name, value))} for name in GRIDS
    }
    ours = grids["umup"]
    if gains := {
        value: theirs.loss - best.loss for value, best in ours.items() if (theirs := better_baseline(results, value))
    }:
        text = ", ".join(f"{value}: {gain:+.3f}" for value, gain in gains.items())
        yield min(gains.values()) > 0, f"umup's best beats the baselines' best at every {axis} (gain in nats {text})"
    if len(ours) > 1:
        for name, bests in ((name, grids[name]) for name in reversed(GRIDS) if grids[name]):
            factor = _spread_of_rates(bests)
            yield factor <= 1, f"{name}'s best learning rate stays within a factor 2 over the {axis}s (2^{factor:g})"
        losses = [ours[value].loss for value in sorted(ours)]
        worst = max(after - before for before, after in pairwise(losses))
        yield worst <= 0, f"larger {axis} is not worse at umup's best learning rate (worst change {worst:+.3f} nats)"
        yield from _all_along(axis, results, ours)
    if excesses := list(_drop_in_excesses(cfg, results)):
        claim = f"drop-in is never more than {DROP_IN_TOLERANCE} nats above the untouched model"
        yield max(excesses) <= DROP_IN_TOLERANCE, f"{claim} (worst {max(excesses):+.3f})"


def _all_along(axis: str, results: Sequence[Result[RateRun]], bests: Mapping[int, Best]) -> Iterator[tuple[bool, str]]:
    """Whether the larger model's training loss is below the smaller one's at every point, at one rate for all."""
    if axis not in ("width", "depth"):
        return  # other axes change what a point of the curve is
    rate = bests[min(bests)].learning_rate
    curves = [mean_curve(results, "umup", value, rate) for value in sorted(bests)]
    points = [
        (larger, smaller)
        for before, after in pairwise(curves)
        for smaller, larger in list(zip(before, after, strict=False))[len(before) // 10 :]
    ]
    if points:
        share = fmean(larger <= smaller for larger, smaller in points)
        claim = f"larger {axis} is better all along umup's training at {readable_rate(rate)}"
        yield share == 1, f"{claim} ({share:.0%} of the points after the first tenth)"


def mean_curve(results: Sequence[Result[RateRun]], name: str, value: int | str, rate: float) -> list[float]:
    """Training loss over the steps, of the mean of the seeds; as long as the shortest, infinite where one diverged."""
    curves = [
        result.curve
        for result in results
        if (result.run.parametrization, result.run.value, result.run.learning_rate) == (name, value, rate)
    ]
    return [fmean(math.inf if loss is None else loss for loss in point) for point in zip(*curves, strict=False)]


def _spread_of_rates(bests: Mapping[int, Best]) -> float:
    """Between the smallest and the largest, as a power of two."""
    exponents = [math.log2(best.learning_rate) for best in bests.values()]
    return max(exponents) - min(exponents) if exponents else 0.0


def _drop_in_excesses(cfg: DictConfig, results: Sequence[Result[RateRun]]) -> Iterator[float]:
    """Loss of the scaled model above that of the untouched one at the same learning rate."""
    for value in cfg.sweep.drop_in.points:
        plain, scaled = losses_of(results, "standard", value), losses_of(results, "drop-in", value)
        yield from (fmean(scaled[rate]) - fmean(plain[rate]) for rate in scaled if rate in plain)
