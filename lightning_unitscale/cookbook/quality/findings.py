"""What the runs of `unitscale quality` show of a job: the best of each variant, and whether the two goals are met.

    tuned     umup's best is not worse than the better of standard's and fan-in's, to the noise of the seeds
    drop-in   at a rate at which the untouched model trains, drop-in's score is not above its by more than a share of
              what its score fell by, plus the noise of the seeds

Noise is half the range over the seeds, the larger of the two that are compared; 0 with one seed. A model trains at a
rate where its score falls by that same share of what it falls by at its best rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median

from lightning_unitscale.cookbook.learning_rates.findings import Best, best_of, better_baseline, losses_of
from lightning_unitscale.cookbook.learning_rates.grid import RateRun
from lightning_unitscale.cookbook.sweeps.results import Result


@dataclass(frozen=True)
class DropInCell:
    """One learning rate at which the untouched model trains.

    Attributes:
        standard, drop_in: mean scores.
        allowed: what the drop-in's may be.
    """

    learning_rate: float
    standard: float
    drop_in: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether drop-in is not worse."""
        return self.drop_in <= self.allowed


@dataclass(frozen=True)
class JobFindings:
    """One job's results.

    Args:
        job: its name.
        results: of its runs and others.
        share: of a fall in score: what is not counted.
    """

    job: str
    results: Sequence[Result[RateRun]]
    share: float

    @cached_property
    def own(self) -> list[Result[RateRun]]:
        """The results of this job."""
        return [result for result in self.results if result.run.value == self.job]

    @cached_property
    def bests(self) -> Mapping[str, Best]:
        """By variant."""
        variants = dict.fromkeys(result.run.parametrization for result in self.own)
        return {name: best for name in variants if (best := best_of(self.own, name, self.job))}

    @cached_property
    def untrained(self) -> float:
        """The score of the untouched model before training, mean of the seeds; NaN without a run."""
        standard = [result.untrained for result in self.own if result.run.parametrization == "standard"]
        scores = [score for score in standard if score is not None]
        return fmean(scores) if scores else math.nan

    @cached_property
    def baseline(self) -> Best | None:
        """The better of the two tuned baselines."""
        return better_baseline(self.own, self.job)

    @property
    def gain(self) -> float | None:
        """What umup's best score is below the baseline's; None where a run is missing."""
        if self.baseline is None or "umup" not in self.bests:
            return None
        return self.baseline.loss - self.bests["umup"].loss

    @property
    def noise(self) -> float:
        """Of the gain."""
        return max((best.noise for best in (self.baseline, self.bests.get("umup")) if best), default=0.0)

    @property
    def tuned_holds(self) -> bool | None:
        """The first goal."""
        return None if self.gain is None else self.gain >= -self.noise

    @cached_property
    def cells(self) -> list[DropInCell]:
        """The learning rates that the second goal is about."""
        standard, drop_in = (losses_of(self.own, name, self.job) for name in ("standard", "drop-in"))
        means = {rate: fmean(scores) for rate, scores in standard.items()}
        least = self.share * (self.untrained - min(means.values(), default=math.inf))
        cells = []
        for rate in drop_in:
            fall = self.untrained - means.get(rate, math.inf)
            if fall > 0 and fall >= least:
                noise = max((max(scores) - min(scores)) / 2 for scores in (standard[rate],))
                allowed = means[rate] + self.share * fall + noise
                cells.append(DropInCell(rate, means[rate], fmean(drop_in[rate]), allowed))
        return cells

    def step_cost(self, variant: str) -> float | None:
        """Time of a step beside the untouched model's, medians over all runs; None where a run is missing."""
        times: dict[str, list[float]] = {}
        for result in self.own:
            if result.step_seconds is not None:
                times.setdefault(result.run.parametrization, []).append(result.step_seconds)
        if variant not in times or "standard" not in times:
            return None
        return median(times[variant]) / median(times["standard"])

    @property
    def refusals(self) -> list[str]:
        """Why unit scaling did not take the model, each reason once."""
        return list(dict.fromkeys(result.error for result in self.own if result.error))


def goals(findings: Sequence[JobFindings], wanted: float) -> list[tuple[bool, str]]:
    """(whether it holds, the goal with its numbers), over all jobs that have the runs for it.

    Args:
        findings: one for each job.
        wanted: the share of cells in which drop-in may not be worse.
    """
    tuned = [job for job in findings if job.tuned_holds is not None]
    cells = [cell for job in findings for cell in job.cells]
    claims = []
    if tuned:
        held = sum(bool(job.tuned_holds) for job in tuned)
        better = sum((job.gain or 0) > job.noise for job in tuned)
        claim = "umup's best is within the seeds' noise of the better tuned baseline, or below"
        claims.append((held == len(tuned), f"{claim}: {held} of {len(tuned)} jobs ({better} below)"))
    if cells:
        held = sum(cell.holds for cell in cells)
        claim = f"drop-in is not worse at rates at which the untouched model trains, in {wanted:.0%} of cells"
        claims.append((held >= wanted * len(cells), f"{claim}: {held} of {len(cells)} ({held / len(cells):.0%})"))
    return claims
