"""The tables of `unitscale quality`: one line a job, and every score with the minima marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from rich.table import Table

from lightning_unitscale.cookbook.learning_rates.findings import Best, losses_of
from lightning_unitscale.cookbook.learning_rates.grid import readable_rate
from lightning_unitscale.cookbook.learning_rates.tables import mean_and_spread
from lightning_unitscale.cookbook.quality.findings import JobFindings
from lightning_unitscale.cookbook.tables import new_table


def goals_table(findings: Sequence[JobFindings], variants: Sequence[str]) -> Table:
    """Each variant's best score and its rate, umup's gain, and the drop-in's cells where there is one."""
    extra = {"umup": "umup's gain", "drop-in": "drop-in not worse"}
    table = new_table(
        "Best held-out score (the lower the better) ± half the range of the seeds, and its learning rate",
        ["job"],
        ["untrained", *variants, *(title for variant, title in extra.items() if variant in variants)],
    )
    table.caption = "> best of the job; * at the edge of the grid: the best may lie outside; NO: a goal is not met"
    for job in findings:
        lowest = min((best.loss for best in job.bests.values()), default=math.nan)
        bests = [best_cell(job.bests.get(variant), lowest) for variant in variants]
        gain = "" if job.gain is None else f"{job.gain:+.3f}" + ("" if job.tuned_holds else " NO")
        held = sum(cell.holds for cell in job.cells)
        cells = f"{held} of {len(job.cells)}" + ("" if held == len(job.cells) else " NO") if job.cells else ""
        asides = {"umup": gain, "drop-in": cells}
        table.add_row(job.job, f"{job.untrained:.3f}", *bests, *(asides[name] for name in extra if name in variants))
    return table


def cost_table(findings: Sequence[JobFindings], variants: Sequence[str]) -> Table:
    """Processor time of a training step, beside the untouched model's."""
    table = new_table("Time of a training step beside the untouched model's, median of all runs", ["job"], variants)
    for job in findings:
        costs = [job.step_cost(variant) for variant in variants]
        table.add_row(job.job, *("" if cost is None else f"{cost:.2f}" for cost in costs))
    return table


def best_cell(best: Best | None, lowest: float) -> str:
    """Score, noise and rate; marked where it is the lowest."""
    if best is None:
        return ""
    if not math.isfinite(best.loss):
        return "diverged"
    mark = "> " if best.loss == lowest else ""
    return f"{mark}{mean_and_spread(best.losses)} at {readable_rate(best.learning_rate)}{'*' if best.at_edge else ''}"


def score_rows(job: JobFindings, variants: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Learning rates, and a row of scores for each variant: its lowest marked, drop-ins that are worse named so."""
    scores = {variant: losses_of(job.own, variant, job.job) for variant in variants}
    rates = sorted({rate for of_variant in scores.values() for rate in of_variant})
    worse = {cell.learning_rate for cell in job.cells if not cell.holds}
    rows = []
    for variant, of_variant in scores.items():
        cells = [_score(of_variant.get(rate, ()), job.bests.get(variant), rate) for rate in rates]
        if variant == "drop-in":
            cells = [f"{cell} worse" if rate in worse else cell for rate, cell in zip(rates, cells, strict=True)]
        rows.append([variant, *cells])
    return [readable_rate(rate) for rate in rates], rows


def _score(scores: Sequence[float], best: Best | None, rate: float) -> str:
    if not scores:
        return ""
    text = mean_and_spread(scores) if math.isfinite(fmean(scores)) else "diverged"
    return f"> {text}" if best is not None and best.learning_rate == rate else text
