"""Measure forward and backward in FP8 on a GPU: static scales beside bf16 and torchao's dynamic ones.

    unitscale fp8_benchmark                     # = python recipes/fp8_benchmark.py; a GPU of compute capability 8.9
    unitscale fp8_benchmark device=cpu linears=[[64,64,64]] blocks=[[64,32]] moe=[[64,32]] rounds=2 warm_up=1 \\
        race.width=64 race.depth=1 race.tokens=64 race.batch=4 race.steps=20    # does it run?

Variants of one module, all in bf16 with the same weights:

    bf16                  the module as it is
    static                unit_scale(module, step, scheme="preserve", format="fp8")
    torchao-tensorwise    torchao.float8.convert_to_float8_training, one dynamic scale per tensor
    torchao-rowwise       the same, one dynamic scale per row
    transformer-engine    transformer_engine.pytorch.Linear under fp8_autocast, if it is installed

It ends within `minutes`: what there was no time for is said to be left out. First all modules in eager mode, then the
race to the same loss (a Llama on the standard library's sources, under bf16 autocast), then all modules compiled.

Times are medians of one step's forward and backward, variants alternated in every round. Before each step the weights
are written, as an optimizer does, so no cast of them is kept from the step before. Peak memory is what a step needs
beside weights, input and the gradient that it starts from; saved memory is what autograd keeps for the backward pass,
weights among it (of static, the cast ones).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.checks import check_known
from lightning_unitscale.cookbook.measuring.fp8_comparison import (
    VARIANTS,
    Case,
    Row,
    compare_variants,
    configured_cases,
)
from lightning_unitscale.cookbook.measuring.fp8_tables import machine, race_table, results_table
from lightning_unitscale.cookbook.measuring.side_by_side import MODES
from lightning_unitscale.cookbook.measuring.time_to_loss import Race, race
from lightning_unitscale.cookbook.tables import print_and_keep
from lightning_unitscale.cookbook.wrong_values import check_whole_numbers
from lightning_unitscale.errors import InputError


@recipe("fp8_benchmark")
def main(cfg: DictConfig) -> None:
    """Prints the table and writes it, with all numbers, into the run's folder."""
    check(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    deadline = time.monotonic() + 60 * cfg.minutes
    cases = configured_cases(cfg)
    modes = [mode for mode in MODES if mode in cfg.modes]  # eager first: it needs no compiler
    rows = list(measure(cases, modes[0], cfg, deadline))
    races = [raced(variant, modes[-1], cfg, deadline) for variant in cfg.variants] if cfg.race.steps else []
    for mode in modes[1:]:
        rows += measure(cases, mode, cfg, deadline)
    title = machine(torch.device(cfg.device))
    numbers = {"machine": title, "rows": [asdict(row) for row in rows], "races": [asdict(each) for each in races]}
    (folder / "fp8_benchmark.json").write_text(json.dumps(numbers))
    print_and_keep(folder / "fp8_benchmark.txt", results_table(title, rows), race_table(cfg, races), width=140)


def measure(cases: Sequence[Case], mode: str, cfg: DictConfig, deadline: float) -> Iterator[Row]:
    """All variants of all cases, as long as there is time."""
    for case in cases:
        if time.monotonic() > deadline:
            yield Row(case.name, mode, "all", error=f"left out: minutes={cfg.minutes} are over")
            continue
        for row in compare_variants(case, mode, cfg):
            print(row.case, row.mode, row.variant, row.error or f"{row.milliseconds:.3f} ms", flush=True)
            yield row


def raced(variant: str, mode: str, cfg: DictConfig, deadline: float) -> Race:
    """One variant's race; one that can't run says why."""
    try:
        found = race(variant, mode, cfg, deadline)
    except Exception as error:
        found = Race(variant, [], f"{type(error).__name__}: {error}".partition("\n")[0][:100])
    torch._dynamo.reset()
    print("race", variant, found.error or f"{found.losses[-1][0]:.1f} s", flush=True)
    return found


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that mean nothing or can't be run here."""
    check_known("variants", cfg.variants, VARIANTS)
    check_known("modes", cfg.modes, MODES)
    for key, sizes in (("linears", 3), ("blocks", 2), ("moe", 2)):
        for shape in cfg[key]:
            if len(shape) != sizes or not all(isinstance(size, int) and size > 0 for size in shape):
                raise InputError(f"{key}: {list(shape)} must be {sizes} positive whole numbers")
    check_whole_numbers(cfg, "rounds", *(f"race.{size}" for size in ("width", "depth", "tokens", "batch", "every")))
    if not cfg.modes:
        raise InputError(f"modes=[]: choose from {', '.join(MODES)}")
    if not cfg.minutes > 0:
        raise InputError(f"minutes={cfg.minutes} must be above 0")
    device = torch.device(cfg.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={cfg.device}: this machine has no CUDA device; device=cpu shows that everything runs")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise InputError(f"device={cfg.device}: FP8 products need compute capability 8.9 (Ada, Hopper or later)")


if __name__ == "__main__":
    main()
