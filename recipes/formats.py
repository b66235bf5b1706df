"""Compare number formats by what a language model learns in them.

    unitscale formats                                 # = python recipes/formats.py; 18 runs, half an hour on two cores
    unitscale formats seeds=[1] model.width=64
    unitscale formats model.width=256 only=[umup,umup-fp8]
    unitscale formats '+variants.mine=["unitscale.format=fp8","unitscale.recalibrate=[100]"]'

Every run is the recipe `pretrain` with some overrides, the same text, steps and batches. A finished run is one line in
`runs.jsonl`; runs that are there with the same settings are not run again. After a change of the package itself, delete
that file. On a CPU the casts are real and the products are made of upcast operands: what is measured is accuracy, and
FP8 is slower here than no format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.runs import check
from lightning_unitscale.cookbook.sweeps.sweep import finish_runs, run_configuration
from lightning_unitscale.cookbook.tables import new_table, print_and_keep
from lightning_unitscale.errors import InputError


@dataclass(frozen=True)
class VariantRun:
    """One training run: a name in `cfg.variants`, and a seed."""

    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    def to_row(self) -> dict[str, Any]:
        """Its part of the line in `runs.jsonl`."""
        return asdict(self)


@recipe("formats")
def main(cfg: DictConfig) -> None:
    """Runs what is not finished yet, then prints the table and writes it to formats.txt."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    variants = chosen(cfg)
    runs = [VariantRun(variant, seed) for seed in cfg.seeds for variant in variants]
    configurations = {run: configuration(cfg, run) for run in runs}
    for run_cfg in configurations.values():
        check(run_cfg)
    results = finish_runs(configurations, folder / "runs.jsonl", threads=cfg.threads)
    losses = {name: [results[VariantRun(name, seed)].held_out for seed in cfg.seeds] for name in variants}
    print_and_keep(folder / "formats.txt", loss_table(cfg, losses))


def chosen(cfg: DictConfig) -> list[str]:
    """The names of the variants to compare.

    Raises:
        InputError: `only` names one that there is not.
    """
    known = [str(name) for name in cfg.variants]
    wanted = known if cfg.only is None else [str(name) for name in cfg.only]
    if unknown := [name for name in wanted if name not in known]:
        raise InputError(f"only={','.join(unknown)}: there are the variants {', '.join(known)}")
    return wanted


def configuration(cfg: DictConfig, run: VariantRun) -> DictConfig:
    """The settings of `unitscale pretrain` for one run.

    Raises:
        InputError: an override of the variant is not one of that recipe.
    """
    cfg, overrides = run_configuration(cfg, run.seed), list(cfg.variants[run.variant])
    if any(override.startswith("unitscale.scheme=") for override in overrides):
        cfg.unitscale.hyperparameters = {}  # which were another scheme's
    try:
        cfg.merge_with_dotlist(overrides)
    except OmegaConfBaseException as error:
        raise InputError(f"variants.{run.variant}: {error}".replace("\n", " ")) from error
    return cfg


def loss_table(cfg: DictConfig, losses: Mapping[str, Sequence[float]]) -> Table:
    """One row for each variant: the losses of its seeds, their mean, and how far that is from the first variant's."""
    title = f"Held-out loss, nats per byte, width {cfg.model.width}, after {cfg.trainer.max_steps} steps"
    seeds = [f"seed {seed}" for seed in cfg.seeds]
    table = new_table(title, ["variant"], [*seeds, "mean", "to the first"])
    reference = fmean(next(iter(losses.values())))
    for variant, of_seeds in losses.items():
        mean = fmean(of_seeds)  # infinite where one of them diverged
        cells = [f"{loss:.3f}" if math.isfinite(loss) else "diverged" for loss in of_seeds]
        change = f"{mean / reference - 1:+.2%}" if math.isfinite(mean) and math.isfinite(reference) else ""
        table.add_row(variant, *cells, f"{mean:.3f}", change)
    return table


if __name__ == "__main__":
    main()
