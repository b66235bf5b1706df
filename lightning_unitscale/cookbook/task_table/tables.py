"""The table of `unitscale tasks`: printed, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from lightning_unitscale.cookbook.learning_rates.grid import readable_rate
from lightning_unitscale.cookbook.learning_rates.tables import mean_and_spread
from lightning_unitscale.cookbook.tables import new_table
from lightning_unitscale.cookbook.task_table.findings import Cell, TaskRow

ARROWS = {"min": "↓", "max": "↑"}
CAPTION = "test score ± half the range of the seeds, and its learning rate; * at the edge of the grid; NO: worse"


def table_rows(rows: Sequence[TaskRow], variants: Sequence[str]) -> list[list[str]]:
    """For each task its name, its score with the direction that is better, and each variant."""
    return [
        [
            row.task,
            f"{row.score.removeprefix('test/')} {ARROWS[row.mode]}",
            *(_shown(row.cells.get(variant)) + (" NO" if row.holds(variant) is False else "") for variant in variants),
            str(max((len(cell.scores) for cell in row.cells.values()), default=0)),
        ]
        for row in rows
    ]


def header(variants: Sequence[str]) -> list[str]:
    """Of the columns."""
    return ["task", "score", *variants, "seeds"]


def printed(rows: Sequence[TaskRow], variants: Sequence[str]) -> Table:
    """For the terminal."""
    table = new_table("Tasks, untouched and with unit scaling", ["task", "score"], header(variants)[2:])
    table.caption = CAPTION
    for cells in table_rows(rows, variants):
        table.add_row(*cells)
    return table


def markdown(rows: Sequence[TaskRow], variants: Sequence[str]) -> str:
    """For a document."""
    lines = [header(variants), ["---"] * len(header(variants)), *table_rows(rows, variants)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if math.isnan(cell.mean):
        return "diverged"
    return f"{mean_and_spread(cell.scores)} at {readable_rate(cell.learning_rate)}{'*' if cell.at_edge else ''}"
