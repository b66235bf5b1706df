"""What the finished runs of a sweep leave: one line each in `runs.jsonl`, from which a stopped sweep goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar


class Run(Protocol):
    """What tells the runs of a sweep apart: hashable, and `str` of it names the run where its result is printed."""

    def to_row(self) -> dict[str, Any]:
        """Its part of the line, plain values by name."""


RunT = TypeVar("RunT", bound=Run)


@dataclass(frozen=True)
class Result(Generic[RunT]):
    """What one run has shown.

    Attributes:
        settings: hash of everything that decides the result, see `settings_hash`.
        held_out: score on held-out data after the last step, the lower the better (of language models the loss in nats
            per byte); infinite where training diverged.
        untrained: the same score before training, of the model as it is built; None where it was not asked for.
        first_loss: training loss of the first step, with a plan in force; None where there was none.
        curve: training loss, averaged over 10 steps; None where it was not finite.
        error: why the run was refused; empty for a run that came to its end.
        step_seconds: processor time of a training step, the median; None where it was not measured.
        scores: others that were asked for, by name.
        seconds: that the run took.
    """

    run: RunT
    settings: str
    held_out: float
    untrained: float | None = None
    first_loss: float | None = None
    curve: list[float | None] = field(default_factory=list)
    error: str = ""
    step_seconds: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def to_row(self) -> dict[str, Any]:
        """Plain values; infinity, which JSON doesn't know, as None."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "run"}
        return {**self.run.to_row(), **own, "held_out": self.held_out if math.isfinite(self.held_out) else None}


def append_result(file: Path, result: Result[Any]) -> None:
    """One more line; on a new one, too, where a former sweep was stopped while it wrote."""
    cut_short = file.exists() and file.stat().st_size > 0 and not file.read_bytes().endswith(b"\n")
    with file.open("a") as stream:
        stream.write("\n" * cut_short + json.dumps(result.to_row()) + "\n")


def read_results(file: Path, runs: Mapping[RunT, str]) -> dict[RunT, Result[RunT]]:
    """The results of those runs that are finished, in the order of `runs`.

    A line cut short by an interrupt doesn't count.

    Args:
        file: need not exist yet.
        runs: the hash of each run's settings, by which its line is found.
    """
    rows: dict[str, dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["settings"]] = row
    return {run: _result(run, rows[key]) for run, key in runs.items() if key in rows}


def _result(run: RunT, row: Mapping[str, Any]) -> Result[RunT]:
    held_out = math.inf if row["held_out"] is None else row["held_out"]
    own = {item.name: row[item.name] for item in fields(Result) if item.name in row and item.name != "run"}
    return Result(run, **{**own, "held_out": held_out})
