"""What a search for hyperparameters found, as a table, and what to try next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from lightning_unitscale.cookbook.sweeps.search import Losses, best_of, shown
from lightning_unitscale.cookbook.sweeps.space import Point, Space
from lightning_unitscale.cookbook.tables import new_table


def search_table(cfg: DictConfig, found: Mapping[str, Losses], default: Mapping[str, Any]) -> Table:
    """For each search the number of its runs, the best loss and its settings; first, with the learning rate alone."""
    title = f"Held-out loss, nats per byte, width {cfg.model.width}, after {cfg.trainer.max_steps} steps"
    table = new_table(title, ["search", "best settings"], ["runs", "held-out loss"])
    rows = dict(found)
    if "independent" in found:
        rate_alone = {
            p: v for p, v in found["independent"].items() if dict(p) == {**default, cfg.rate: dict(p)[cfg.rate]}
        }
        rows = {"learning rate alone": rate_alone, **rows}
    for name, losses in rows.items():
        best = best_of(losses)
        table.add_row(name, shown(best), str(len(losses) * len(cfg.seeds)), f"{losses[best]:.3f}")
    return table


def at_edges(space: Space, chosen: Point) -> Iterator[str]:
    """What was chosen at the end of its values: better ones may lie beyond."""
    for name, value in chosen:
        numbers = [v for v in space[name] if isinstance(v, (int, float))]
        if len(numbers) > 1 and value in (min(numbers), max(numbers)):
            yield f"{name}={value} is at the edge of its values; others beyond may be better"
