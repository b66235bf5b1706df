"""The page of `unitscale quality`: goals, the table, and for each job its scores by learning rate."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no display, no global state

from lightning_unitscale.cookbook.learning_rates.findings import losses_of
from lightning_unitscale.cookbook.quality.findings import JobFindings
from lightning_unitscale.cookbook.quality.tables import best_cell, score_rows
from lightning_unitscale.monitor.page import image, section, table, write_page

HOW_TO_READ = """\
A line is a variant's mean score over the seeds by learning rate; its band goes from the best to the worst seed, a ring
marks its best. Left: rates as the untouched model means them. Right: u-μP's η. The dotted line is the score before
training; where a line leaves the frame or ends, training diverged."""


def write_quality_page(
    folder: Path, findings: Sequence[JobFindings], variants: Sequence[str], goals: Sequence[str]
) -> Path:
    """Writes `quality.html` and a PNG file for each job, and returns the page.

    Args:
        folder: the sweep's.
        findings: one for each job.
        variants: their names, in the order of the columns.
        goals: what is met and what is not, in sentences.
    """
    sections = [
        "".join(f"<p>{html.escape(goal)}</p>" for goal in goals),
        table(["job", "untrained", *variants, "gain", "drop-in"], _rows(findings, variants)),
        f"<p>{HOW_TO_READ}</p>",
        *(part for job in findings for part in _job(folder, job, variants)),
    ]
    return write_page(folder / "quality.html", "Training quality, job by job", sections)


def _rows(findings: Sequence[JobFindings], variants: Sequence[str]) -> Iterator[list[str]]:
    for job in findings:
        lowest = min((best.loss for best in job.bests.values()), default=math.nan)
        bests = [html.escape(best_cell(job.bests.get(variant), lowest)) for variant in variants]
        gain = "" if job.gain is None else f"{job.gain:+.3f}"
        held = f"{sum(cell.holds for cell in job.cells)} of {len(job.cells)}" if job.cells else ""
        yield [job.job, f"{job.untrained:.3f}", *bests, gain, held]


def _job(folder: Path, job: JobFindings, variants: Sequence[str]) -> Iterator[str]:
    rates, rows = score_rows(job, variants)
    escaped = [[html.escape(cell) for cell in row] for row in rows]
    yield section(
        html.escape(job.job),
        image(folder / f"{job.job}.png", score_chart(job, variants), f"Score of {job.job} by learning rate"),
        table(["", *rates], escaped),
        *(f"<p>Refused: {html.escape(reason)}</p>" for reason in job.refusals),
    )


def score_chart(job: JobFindings, variants: Sequence[str]) -> Figure:
    """Scores by learning rate: variants that share rates with the untouched model on the left, the others apart."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    shared = set(losses_of(job.own, "standard", job.job))
    for number, variant in enumerate(variants):
        scores = losses_of(job.own, variant, job.job)
        if scores:
            _draw(left if shared & set(scores) else right, scores, variant, f"C{number}")
    bests = [best.loss for best in job.bests.values() if math.isfinite(best.loss)]
    for axes in (left, right):
        if math.isfinite(job.untrained):
            axes.axhline(job.untrained, color="black", linestyle=":", linewidth=0.8)
        if bests and math.isfinite(job.untrained):
            room = abs(job.untrained - min(bests)) or 1.0
            axes.set_ylim(min(bests) - 0.05 * room, max(job.untrained, *bests) + 0.1 * room)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("learning rate")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    left.set_ylabel("held-out score")
    return figure


def _draw(axes: Axes, scores: dict[float, tuple[float, ...]], label: str, colour: str) -> None:
    rates = list(scores)
    means = [fmean(of_seeds) for of_seeds in scores.values()]
    axes.plot(rates, means, marker=".", label=label, color=colour)
    axes.update_datalim([(rate, 1.0) for rate in rates], updatey=False)  # also where nothing of it is finite
    axes.fill_between(rates, list(map(min, scores.values())), list(map(max, scores.values())), color=colour, alpha=0.2)
    lowest = min(means)
    axes.plot([rates[means.index(lowest)]], [lowest], "o", color=colour, markersize=9, fillstyle="none")
