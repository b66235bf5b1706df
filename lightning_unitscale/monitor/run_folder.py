"""What lies in the folder of a run: how it was started and ended, its numbers, its curves, its operands."""

from __future__ import annotations

import csv
import json
from math import isfinite
from pathlib import Path
from typing import Any

from lightning_unitscale.errors import InputError
from lightning_unitscale.monitor.charts import Curve
from lightning_unitscale.monitor.snapshot import FILE, Snapshot
from lightning_unitscale.near_names import not_found

ABOUT, METRICS = "run.json", "metrics.json"  # in `report`; the second is written when the run has ended
LOSSES = {"train/loss": "training", "val/loss": "held out"}  # columns of the log


class RunFolder:
    """What lies in the folder of a run.

    Attributes:
        about: of `write_beginning`, then of `write_report`; empty for a run without either.
        metrics: final numbers by name.
        curves: by column of the log, those of the run that this one goes on from before its own.
        rate: the learning rate by step.
        snapshots: the monitor's.

    Args:
        folder: of the run.
        after: folders of runs that go on from this one; a folder may have been used twice.

    Raises:
        InputError: the folder is not there, or has nothing to report on.
    """

    def __init__(self, folder: Path, after: frozenset[Path] = frozenset()) -> None:
        if not folder.is_dir():
            raise InputError(f"{folder}: {not_found(folder)}")
        report = folder / "report"
        self.folder = folder
        self.about = _read_json(report / ABOUT)
        self.metrics = _read_json(report / METRICS)
        self.curves = _read_log(folder / "csv" / "metrics.csv")
        self.snapshots = Snapshot.read(folder / FILE)
        if not any((self.about, self.curves, self.snapshots, self.metrics)):
            raise InputError(
                f"{folder}: not the folder of a run; it has no {FILE}, csv/metrics.csv, report/{ABOUT} or "
                f"report/{METRICS}"
            )

        chain = after | {folder.resolve()}
        earlier_run = self.about.get("before")
        before = None if earlier_run is None or Path(earlier_run) in chain else RunFolder.if_there(earlier_run, chain)
        if before is not None and self.curves:
            begun = min(step for curve in self.curves.values() for step, _ in curve)
            for column, curve in before.curves.items():
                earlier = [(step, value) for step, value in curve if step < begun]
                self.curves[column] = [*earlier, *self.curves.get(column, [])]

    @classmethod
    def if_there(cls, folder: str | None, after: frozenset[Path] = frozenset()) -> RunFolder | None:
        """None too where the folder has been removed since."""
        try:
            return cls(Path(folder), after) if folder else None
        except InputError:
            return None

    @property
    def title(self) -> str:
        """Of the page."""
        return str(self.about.get("title", self.folder.name))

    @property
    def rate(self) -> Curve:
        """The first group's, as `LearningRateMonitor` logs it."""
        return next((curve for column, curve in self.curves.items() if column.startswith("lr-")), ())

    @property
    def score(self) -> float | None:
        """The number by which it is judged, if it is one."""
        value = self.metrics.get(self.about.get("score", ""))
        return value if isinstance(value, (int, float)) and isfinite(value) else None


def _read_json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def _read_log(log: Path) -> dict[str, list[tuple[int, float]]]:
    """Column -> (step, value) of every row that has one; nothing where CSV logging was off."""
    curves: dict[str, list[tuple[int, float]]] = {}
    if log.exists():
        with log.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for column, value in row.items():
                    if value and column not in ("step", "epoch"):
                        curves.setdefault(column, []).append((int(row["step"]), float(value)))
    return {column: _once(curve) if column.startswith("val/") else curve for column, curve in curves.items()}


def _once(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Without the first of two equal ends: Lightning gives a training's last validation one step less than the next."""
    step, value = curve[-1]
    return [*curve[:-2], curve[-1]] if curve[-2:-1] == [(step - 1, value)] else curve
