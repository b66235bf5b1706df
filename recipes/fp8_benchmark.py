"""Measure forward and backward in FP8 on a GPU: static scales beside bf16 and torchao's dynamic ones.

    unitscale fp8_benchmark                     # = python recipes/fp8_benchmark.py; a GPU of compute capability 8.9
    unitscale fp8_benchmark device=cpu linears=[[64,64,64]] blocks=[[64,32]] rounds=2 warm_up=1     # does it run?

Variants of one module, all in bf16 with the same weights:

    bf16                  the module as it is
    static                unit_scale(module, step, scheme="preserve", format="fp8")
    torchao-tensorwise    torchao.float8.convert_to_float8_training, one dynamic scale per tensor
    torchao-rowwise       the same, one dynamic scale per row

Times are medians of one step's forward and backward, variants alternated in every round. Before each step the weights
are written, as an optimizer does, so no cast of them is kept from the step before. Peak memory is what a step needs
beside weights, input and the gradient that it starts from; saved memory is what autograd keeps for the backward pass,
weights among it (of static, the cast ones).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.checks import check_known, check_whole_numbers
from lightning_unitscale.cookbook.measuring.fp8_comparison import VARIANTS, Row, compare_variants, configured_cases
from lightning_unitscale.cookbook.measuring.side_by_side import MODES
from lightning_unitscale.cookbook.tables import new_table, print_and_keep
from lightning_unitscale.errors import InputError


@recipe("fp8_benchmark")
def main(cfg: DictConfig) -> None:
    """Prints the table and writes it, with all numbers, into the run's folder."""
    check(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    rows: list[Row] = []
    for case in configured_cases(cfg):
        for mode in cfg.modes:
            found = compare_variants(case, mode, cfg)
            for row in found:
                print(row.case, row.mode, row.variant, row.error or f"{row.milliseconds:.3f} ms", flush=True)
            rows += found
    title = machine(torch.device(cfg.device))
    (folder / "fp8_benchmark.json").write_text(json.dumps({"machine": title, "rows": [asdict(row) for row in rows]}))
    print_and_keep(folder / "fp8_benchmark.txt", results_table(title, rows), width=140)


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that mean nothing or can't be run here."""
    check_known("variants", cfg.variants, VARIANTS)
    check_known("modes", cfg.modes, MODES)
    for key, sizes in (("linears", 3), ("blocks", 2)):
        for shape in cfg[key]:
            if len(shape) != sizes or not all(isinstance(size, int) and size > 0 for size in shape):
                raise InputError(f"{key}: {list(shape)} must be {sizes} positive whole numbers")
    check_whole_numbers(cfg, "rounds")
    device = torch.device(cfg.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={cfg.device}: this machine has no CUDA device; device=cpu shows that everything runs")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise InputError(f"device={cfg.device}: FP8 products need compute capability 8.9 (Ada, Hopper or later)")


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


if __name__ == "__main__":
    main()
