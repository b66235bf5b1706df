"""Measure what unit scaling costs: step times beside the untouched model's, and the time of preparation.

    unitscale benchmark                                  # = python recipes/benchmark.py
    unitscale benchmark model.width=512 batch_size=4     # another size
    unitscale benchmark modes=[eager] rounds=100         # steadier numbers
    unitscale benchmark threads=2 clock=wall             # an otherwise idle machine

A step is forward, backward and optimizer. In every round each variant takes one step, in a new order, and its time is
divided by the plain model's of the same round; the table gives medians and quartiles of these ratios. The variants:

    plain           the untouched model
    folded, unit    `unit_scale(model, …)` with storage="folded" and "unit", scheme umup
    unit-scaling    the PyPI package of that name: its transform `unit_scale(model)`

That transform can't run every model (Llama of `transformers` is one that it can't); the table then says so. The model
`written` is the same Llama without the code that stops it, so that all variants run on one model.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.checks import check_known
from lightning_unitscale.cookbook.measuring.side_by_side import MODES
from lightning_unitscale.cookbook.measuring.step_cost import (
    CLOCKS,
    PreparationCost,
    StepCost,
    compare_steps,
    time_preparation,
)
from lightning_unitscale.cookbook.measuring.training_step import MODELS, VARIANTS
from lightning_unitscale.cookbook.tables import new_table
from lightning_unitscale.cookbook.wrong_values import check_whole_numbers
from lightning_unitscale.errors import InputError


@recipe("benchmark")
def main(cfg: DictConfig) -> None:
    """Measures, prints the tables and saves every number."""
    check(cfg)
    torch.set_num_threads(cfg.threads)
    logging.getLogger("unit_scaling").setLevel(logging.WARNING)
    storages = [variant for variant in cfg.variants if variant in ("folded", "unit")]
    prepared = [time_preparation(cfg, model, storage) for model in cfg.models for storage in storages]
    rows = [row for model in cfg.models for mode in cfg.modes for row in compare_steps(cfg, model, mode)]

    console = Console()
    console.print(step_table(cfg, rows))
    for row in rows:
        if row.error:
            where = f"{row.variant} can't run the model {row.model} ({row.mode})"
            console.print(f"{where}: {row.error}", markup=False)
    if prepared:
        console.print(preparation_table(prepared))
    file = Path(HydraConfig.get().runtime.output_dir) / "benchmark.json"
    results = {
        "settings": OmegaConf.to_container(cfg, resolve=True),
        "torch": torch.__version__,
        "machine": f"{platform.machine()} {platform.processor()}".strip(),
        "steps": [row.to_row() for row in rows],
        "preparation": [asdict(cost) for cost in prepared],
    }
    file.write_text(json.dumps(results, indent=1))
    print(f"all numbers: {file}")


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that can't be measured."""
    for key, known in (("models", MODELS), ("modes", MODES), ("variants", VARIANTS)):
        check_known(key, cfg[key], known)
    if "plain" not in cfg.variants:
        raise InputError("variants must contain plain, which the others are divided by")
    if cfg.clock not in CLOCKS:
        raise InputError(f"clock={cfg.clock} is not known; choose one of {', '.join(CLOCKS)}")
    check_whole_numbers(cfg, "rounds", "preparations", "threads", "batch_size")


def step_table(cfg: DictConfig, rows: Sequence[StepCost]) -> Table:
    """Median ratio with its quartiles, and median milliseconds."""
    title = (
        f"Time of a training step, {cfg.rounds} rounds: width {cfg.model.width}, depth {cfg.model.depth}, "
        f"{cfg.batch_size}x{cfg.task.sequence_length} tokens, {cfg.threads} thread(s), {cfg.clock} time"
    )
    table = new_table(title, ("model", "mode", "variant"), ("ms", "scaled / plain", "quartiles"))
    for row in rows:
        cells = ["", "failed", ""]
        if row.seconds and row.ratio:
            low, middle, high = row.ratio
            cells = [f"{1e3 * row.seconds[1]:.1f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
        table.add_row(row.model, row.mode, row.variant, *cells)
    return table


def preparation_table(prepared: Sequence[PreparationCost]) -> Table:
    """How many plain steps a preparation takes."""
    title = "Time of preparation, in eager steps of the plain model"
    table = new_table(title, ("model", "storage"), ("median", "quartiles", "first in the process"))
    for cost in prepared:
        low, middle, high = cost.steps
        table.add_row(cost.model, cost.storage, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{cost.first:.2f}")
    return table


if __name__ == "__main__":
    main()
