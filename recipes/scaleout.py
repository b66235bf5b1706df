"""Measure what planning a model of many billion parameters takes.

    unitscale scaleout                                # = python recipes/scaleout.py: 7, 47 and 70 B parameters
    unitscale scaleout storage=unit models.llama_70b=null

The model is built on `meta`, a step of it is recorded, planned, and the plan put in force: no weight and no activation
has memory. What a run does beside, one reduction a parameter for its RMS, is not in it.
"""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.checks import check_whole_numbers
from lightning_unitscale.cookbook.measuring.scale_out import planning_cost


@recipe("scaleout")
def main(cfg: DictConfig) -> None:
    """Prints the table."""
    check_whole_numbers(cfg, "tokens")
    headings = ("model", "parameters", "record s", "plan s", "apply s", "peak GiB", "plan MiB", "left alone")
    table = Table(*headings, title=f"scheme {cfg.scheme}, {cfg.storage} storage, {cfg.tokens} tokens, on meta")
    for name, config in cfg.models.items():
        if config is None:
            continue
        cost = planning_cost(OmegaConf.to_container(config), cfg.tokens, cfg.scheme, cfg.storage)  # type: ignore[arg-type]
        table.add_row(
            str(name),
            f"{cost.parameters / 1e9:.1f} B",
            *(f"{number:.1f}" for number in (cost.record, cost.plan, cost.apply)),
            *(f"{number:.2f}" for number in (cost.peak, cost.plan_size)),
            str(cost.left_alone),
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
