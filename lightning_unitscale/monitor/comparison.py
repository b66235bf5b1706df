"""One page for several runs, side by side."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from lightning_unitscale.monitor.page import chart, line, section, table, write_page
from lightning_unitscale.monitor.readable import readable
from lightning_unitscale.monitor.run_folder import LOSSES, RunFolder


def compare_runs(folders: Sequence[Path], page: Path) -> Path:
    """One page for several runs: their numbers and settings in columns, their curves in one chart each.

    Raises:
        InputError: a folder is not there, or has nothing to report on.
    """
    runs = [RunFolder(folder) for folder in folders]
    names = _distinct([run.folder for run in runs])
    rows = list(dict.fromkeys(name for run in runs for name in run.metrics))
    numbers = [
        [html.escape(name), *(html.escape(readable(run.metrics.get(name, ""))) for run in runs)] for name in rows
    ]
    facts = list(dict.fromkeys(name for run in runs for name in run.about.get("facts", {})))
    settings = [[name, *(str(run.about.get("facts", {}).get(name, "")) for run in runs)] for name in facts]
    differing = [[html.escape(cell) for cell in row] for row in settings if len(set(row[1:])) > 1]
    head = ["", *map(html.escape, names)]
    endings = ["how it ended", *(html.escape(run.about.get("ending", "")) for run in runs)]
    charts = [
        section(f"Loss: {label}", chart([line(n, run.curves[column]) for n, run in _having(names, runs, column)]))
        for column, label in LOSSES.items()
        if any(column in run.curves for run in runs)
    ]
    rates = [(name, run.rate) for name, run in zip(names, runs, strict=True) if run.rate]
    if rates:
        charts.append(section("Learning rate", chart([line(name, rate) for name, rate in rates])))
    sections = [
        table(head, [endings, *numbers]),
        *charts,
        *([section("What differs", '<div class="words">', table(head, differing), "</div>")] if differing else []),
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    return write_page(page, f"{len(runs)} runs", sections)


def _having(names: Sequence[str], runs: Sequence[RunFolder], column: str) -> list[tuple[str, RunFolder]]:
    return [(name, run) for name, run in zip(names, runs, strict=True) if column in run.curves]


def _distinct(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
