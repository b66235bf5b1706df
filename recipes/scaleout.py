"""Measure what planning a model of many billion parameters takes, and what a step of it then sends over a mesh.

    unitscale scaleout                              # = python recipes/scaleout.py: Llama of 7 and 70 B, Mixtral of 47 B
    unitscale scaleout storage=unit models.llama_70b=null
    unitscale scaleout mesh.data_parallel=128 mesh.tensor_parallel=8     # of 1024 processes, which need not be there
    unitscale scaleout mesh=null                                         # planning alone

The model is built on `meta`, a step of it is recorded, planned, and the plan put in force: no weight and no activation
has memory. What a run does beside, one reduction a parameter for its RMS, is not in it. The step's communication is
counted on torch's fake process group, in a model as deep and narrow, without unit scaling and with it.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.measuring.communication import spread_steps
from lightning_unitscale.cookbook.measuring.scale_out import planning_cost
from lightning_unitscale.cookbook.runs import plain
from lightning_unitscale.cookbook.wrong_values import check_whole_numbers
from lightning_unitscale.errors import InputError


@recipe("scaleout")
def main(cfg: DictConfig) -> None:
    """Prints the tables."""
    check_whole_numbers(cfg, "tokens", "mesh.data_parallel", "mesh.tensor_parallel")
    models = {str(name): plain(config) for name, config in cfg.models.items() if config is not None}
    console = Console(width=120)
    console.print(_planning(models, cfg))
    if cfg.mesh:
        console.print(_steps(models, cfg))


def _planning(models: dict[str, Any], cfg: DictConfig) -> Table:
    headings = ("model", "parameters", "record s", "plan s", "apply s", "peak GiB", "plan MiB", "left alone")
    table = Table(*headings, title=f"scheme {cfg.scheme}, {cfg.storage} storage, {cfg.tokens} tokens, on meta")
    for name, config in models.items():
        cost = planning_cost(config, cfg.tokens, cfg.scheme, cfg.storage)
        table.add_row(
            name,
            f"{cost.parameters / 1e9:.1f} B",
            *(f"{number:.1f}" for number in (cost.record, cost.plan, cost.apply)),
            *(f"{number:.2f}" for number in (cost.peak, cost.plan_size)),
            str(cost.left_alone),
        )
    return table


def _steps(models: dict[str, Any], cfg: DictConfig) -> Table:
    data, tensor = cfg.mesh.data_parallel, cfg.mesh.tensor_parallel
    title = f"a step on {data} × {tensor} processes (FSDP2 × tensor parallel), narrow models"
    table = Table("model", "sent, untouched", "sent, prepared", "s, untouched", "s, prepared", title=title)
    for name, config in models.items():
        try:
            plain_step, scaled = spread_steps(config, data, tensor, cfg.scheme, cfg.storage)
        except InputError as error:
            table.add_row(name, f"not run: {error}", "", "", "")
            continue
        seconds = (f"{step.seconds:.2f}" for step in (plain_step, scaled))
        table.add_row(name, str(plain_step), str(scaled), *seconds)
    return table


if __name__ == "__main__":
    main()
