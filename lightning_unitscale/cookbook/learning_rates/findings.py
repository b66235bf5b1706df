"""What a sweep of learning rates says: the best of each width, and which claims about unit scaling hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from omegaconf import DictConfig

from lightning_unitscale.cookbook.learning_rates.grid import RateRun, is_power_of_two
from lightning_unitscale.cookbook.sweeps.results import Result

DROP_IN_TOLERANCE = 0.1  # nats


@dataclass(frozen=True)
class Best:
    """The best learning rate of one parametrization at one width, by the mean held-out loss of the seeds.

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


def losses_of(results: Sequence[Result[RateRun]], parametrization: str, width: int) -> dict[float, tuple[float, ...]]:
    """Held-out losses of all seeds, by learning rate."""
    losses: dict[float, tuple[float, ...]] = {}
    for result in sorted(results, key=lambda result: (result.run.learning_rate, result.run.seed)):
        if (result.run.parametrization, result.run.width) == (parametrization, width):
            rate = result.run.learning_rate
            losses[rate] = (*losses.get(rate, ()), result.held_out)
    return losses


def best_of(results: Sequence[Result[RateRun]], parametrization: str, width: int) -> Best | None:
    """The best on the grid of powers of two; learning rates with fewer seeds than others don't take part."""
    losses = {rate: all_ for rate, all_ in losses_of(results, parametrization, width).items() if is_power_of_two(rate)}
    if not losses:
        return None
    seeds = max(map(len, losses.values()))
    rate = min((rate for rate in losses if len(losses[rate]) == seeds), key=lambda rate: fmean(losses[rate]))
    return Best(rate, losses[rate], at_edge=rate in (min(losses), max(losses)))


def findings(cfg: DictConfig, results: Sequence[Result[RateRun]]) -> Iterator[tuple[bool, str]]:
    """(whether it holds, the claim with its numbers), for each claim that the results can decide."""
    ours, theirs = (
        {width: best for width in cfg.sweep.widths if (best := best_of(results, name, width))}
        for name in ("umup", "standard")
    )
    if both := [width for width in ours if width in theirs]:
        gains = {width: theirs[width].loss - ours[width].loss for width in both}
        text = ", ".join(f"{width}: {gain:+.3f}" for width, gain in gains.items())
        yield min(gains.values()) > 0, f"umup's best beats standard's best at every width (gain in nats {text})"
    if len(ours) > 1:
        for name, bests in (("umup", ours), ("standard", theirs)):
            factor = _spread_of_rates(bests)
            yield factor <= 1, f"{name}'s best learning rate stays within a factor 2 over the widths (2^{factor:g})"
        losses = [ours[width].loss for width in sorted(ours)]
        worst = max(after - before for before, after in pairwise(losses))
        yield worst <= 0, f"wider is not worse at umup's best learning rate (worst change {worst:+.3f} nats)"
    if excesses := list(_drop_in_excesses(cfg, results)):
        claim = f"drop-in is never more than {DROP_IN_TOLERANCE} nats above the untouched model"
        yield max(excesses) <= DROP_IN_TOLERANCE, f"{claim} (worst {max(excesses):+.3f})"


def _spread_of_rates(bests: Mapping[int, Best]) -> float:
    """Between the smallest and the largest, as a power of two."""
    exponents = [math.log2(best.learning_rate) for best in bests.values()]
    return max(exponents) - min(exponents) if exponents else 0.0


def _drop_in_excesses(cfg: DictConfig, results: Sequence[Result[RateRun]]) -> Iterator[float]:
    """Loss of the scaled model above that of the untouched one at the same learning rate."""
    for width in cfg.sweep.drop_in.widths:
        plain, scaled = losses_of(results, "standard", width), losses_of(results, "drop-in", width)
        yield from (fmean(scaled[rate]) - fmean(plain[rate]) for rate in scaled if rate in plain)
