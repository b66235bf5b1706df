"""What `unitscale fp8_benchmark` measured, as tables, and on what machine."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

import torch
from omegaconf import DictConfig
from rich.table import Table

from lightning_unitscale.cookbook.measuring.fp8_comparison import Row
from lightning_unitscale.cookbook.measuring.time_to_loss import Race
from lightning_unitscale.cookbook.tables import new_table


def machine(device: torch.device) -> str:
    """Hardware, versions and date."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    try:
        import torchao

        versions = f"torch {torch.__version__}, torchao {torchao.__version__}"
    except ImportError:
        versions = f"torch {torch.__version__}, no torchao"
    return f"{name}, {versions}, {date.today()}"


def results_table(title: str, rows: Sequence[Row]) -> Table:
    """All rows."""
    table = new_table(title, ("case", "mode", "variant"), ("ms", "bf16 / this", "peak MiB", "saved MiB"))
    for row in rows:
        numbers = ((row.milliseconds, ".3f"), (row.ratio, ".2f"), (row.peak, ".0f"), (row.saved, ".1f"))
        cells = ["" if number is None else format(number, spec) for number, spec in numbers]
        table.add_row(row.case, row.mode, row.variant, *([row.error, "", "", ""] if row.error else cells))
    return table


def race_table(cfg: DictConfig, races: Sequence[Race]) -> Table:
    """How long each variant took to the loss that all reached."""
    title = f"race: a Llama of width {cfg.race.width}, depth {cfg.race.depth}, {cfg.race.steps} steps"
    table = new_table(title, ("variant",), ("last loss", "seconds in all", "seconds to the same loss", "bf16 / this"))
    whole = [each for each in races if not each.error]
    goal = max((each.losses[-1][1] for each in whole), default=0.0)
    reference = next((each.seconds_to(goal) for each in whole if each.variant == "bf16"), None)
    for each in races:
        if each.error:
            table.add_row(each.variant, each.error, "", "", "")
            continue
        (seconds, loss), to_goal = each.losses[-1], each.seconds_to(goal)
        ratio = f"{reference / to_goal:.2f}" if reference and to_goal else ""
        table.add_row(each.variant, f"{loss:.4f}", f"{seconds:.1f}", f"{to_goal:.1f}" if to_goal else "", ratio)
    return table
