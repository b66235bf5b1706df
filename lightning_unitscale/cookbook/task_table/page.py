"""The page of `unitscale tasks`: the claims, the table, and for each task its validation score by learning rate."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_unitscale.cookbook.learning_rates.grid import RateRun
from lightning_unitscale.cookbook.quality.findings import JobFindings
from lightning_unitscale.cookbook.quality.page import score_chart
from lightning_unitscale.cookbook.quality.tables import score_rows
from lightning_unitscale.cookbook.sweeps.results import Result
from lightning_unitscale.cookbook.task_table.findings import TaskRow
from lightning_unitscale.cookbook.task_table.tables import CAPTION, header, table_rows
from lightning_unitscale.monitor.page import image, section, table, write_page

HOW_TO_READ = """\
Below, for each task, the validation score by which the best rate was chosen, the lower the better (the negative of a
score of which more is better). Left: rates as the untouched model means them. Right: u-μP's η."""


def write_tasks_page(
    folder: Path,
    rows: Sequence[TaskRow],
    results: Sequence[Result[RateRun]],
    variants: Sequence[str],
    claims: Sequence[str],
) -> Path:
    """Writes `tasks.html` and a PNG file for each task, and returns the page.

    Args:
        folder: the sweep's.
        rows: one for each task.
        results: of all runs.
        variants: their names, in the order of the columns.
        claims: what holds and what does not, in sentences.
    """
    cells = [[html.escape(cell) for cell in row] for row in table_rows(rows, variants)]
    sections = [
        "".join(f"<p>{html.escape(claim)}</p>" for claim in claims),
        table(header(variants), cells),
        f"<p>{html.escape(CAPTION)}</p><p>{HOW_TO_READ}</p>",
        *(part for row in rows for part in _task(folder, row, results, variants)),
    ]
    return write_page(folder / "tasks.html", "Tasks, untouched and with unit scaling", sections)


def _task(folder: Path, row: TaskRow, results: Sequence[Result[RateRun]], variants: Sequence[str]) -> Iterator[str]:
    findings = JobFindings(row.task, results, share=0.0)
    rates, scores = score_rows(findings, variants)
    yield section(
        html.escape(row.task),
        image(folder / f"{row.task}.png", score_chart(findings, variants), f"Score of {row.task} by learning rate"),
        table(["", *rates], [[html.escape(cell) for cell in cells] for cells in scores]),
        *(f"<p>Refused: {html.escape(reason)}</p>" for reason in row.refusals),
    )
