"""What the runs of `unitscale tasks` show: each variant's test score at its best rate, beside the untouched model's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from omegaconf import DictConfig

from lightning_unitscale.cookbook.learning_rates.findings import best_of
from lightning_unitscale.cookbook.learning_rates.grid import RateRun
from lightning_unitscale.cookbook.sweeps.results import Result
from lightning_unitscale.cookbook.task_table.grid import DROP_IN, UNTOUCHED, score_of


@dataclass(frozen=True)
class Cell:
    """One variant of a task.

    Attributes:
        learning_rate: its best one by the validation score.
        scores: test scores of the seeds at this rate; NaN where training diverged.
        at_edge: the best rate is at the edge of what was tried.
    """

    learning_rate: float
    scores: tuple[float, ...]
    at_edge: bool

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.scores)

    @property
    def noise(self) -> float:
        """Half the range over the seeds; 0 with one seed."""
        return (max(self.scores) - min(self.scores)) / 2


@dataclass(frozen=True)
class TaskRow:
    """One task: its score, whether "min" or "max" is better, and its variants."""

    task: str
    score: str
    mode: str
    cells: Mapping[str, Cell]
    refusals: Sequence[str]

    def holds(self, variant: str) -> bool | None:
        """Whether a variant is not worse than the untouched model, to the noise; None where a run is missing."""
        own, untouched = self.cells.get(variant), self.cells.get(UNTOUCHED)
        if own is None or untouched is None or variant == UNTOUCHED or math.isnan(untouched.mean):
            return None
        loss = own.mean - untouched.mean if self.mode == "min" else untouched.mean - own.mean
        return loss <= max(own.noise, untouched.noise)  # NaN is not


def task_rows(
    cfg: DictConfig, results: Iterable[Result[RateRun]], configurations: Mapping[RateRun, DictConfig]
) -> list[TaskRow]:
    """A row for each task that has results."""
    rows = []
    for task in cfg.tasks:
        own = [result for result in results if result.run.value == task]
        if not own:
            continue
        name, mode = score_of(configurations[own[0].run])
        cells = {str(variant): cell for variant in cfg.variants if (cell := _cell(own, str(variant), task, name))}
        refusals = list(dict.fromkeys(result.error for result in own if result.error))
        rows.append(TaskRow(task, name, mode, cells, refusals))
    return rows


def _cell(results: Sequence[Result[RateRun]], variant: str, task: str, score: str) -> Cell | None:
    best = best_of(results, variant, task)
    if best is None:
        return None
    at_best = [r for r in results if (r.run.parametrization, r.run.learning_rate) == (variant, best.learning_rate)]
    scores = tuple(result.scores.get(score, math.nan) for result in at_best)
    return Cell(best.learning_rate, scores, at_edge=best.at_edge and variant != DROP_IN)


def claims(rows: Sequence[TaskRow], variants: Iterable[str]) -> list[tuple[bool, str]]:
    """(whether it holds, the claim with its numbers), for each variant beside the untouched model."""
    found = []
    for variant in variants:
        decided = {row.task: holds for row in rows if (holds := row.holds(variant)) is not None}
        worse = [task for task, holds in decided.items() if not holds]
        if decided:
            claim = f"{variant} is not worse than the untouched model at its best rate, to the noise of the seeds"
            names = f"; worse: {', '.join(worse)}" if worse else ""
            found.append((not worse, f"{claim}: {len(decided) - len(worse)} of {len(decided)} tasks{names}"))
    return found
