"""The models of a distillation side by side, kept in the run's folder as they are done, so that it can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from lightning_unitscale.cookbook.tables import new_table

FILE = "distill.json"


class DistillationResults:
    """Parameters and test scores of each model by name.

    Args:
        folder: of the run.
        go_on: with what an interrupted run in this folder has finished.
    """

    def __init__(self, folder: Path, *, go_on: bool) -> None:
        self.file = folder / FILE
        self.rows: dict[str, dict[str, Any]] = {}
        if go_on and self.file.is_file():
            self.rows = json.loads(self.file.read_text())

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def add(self, name: str, model: PreTrainedModel, scores: Mapping[str, float]) -> None:
        """Add a model with its test scores, and write down all."""
        own = {score.removeprefix("test/"): value for score, value in scores.items()}
        self.rows[name] = {"parameters": model.num_parameters(), **own}
        self.file.write_text(json.dumps(self.rows, indent=1))

    def show(self) -> None:
        """Print them as a table."""
        scores = list(dict.fromkeys(score for row in self.rows.values() for score in row if score != "parameters"))
        table = new_table("Distillation: scores of the test", [""], ["parameters", *scores])
        for name, row in self.rows.items():
            cells = [f"{row[score]:.4f}" if score in row else "" for score in scores]
            table.add_row(name, f"{row['parameters']:,}", *cells)
        Console().print(table)
