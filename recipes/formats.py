"""Compare number formats by what models of several kinds learn in them.

    unitscale formats                                 # = python recipes/formats.py; the main job, half an hour and more
    unitscale formats seeds=[1] model.width=64
    unitscale formats model.width=256 only=[umup,umup-fp8]
    unitscale formats jobs=[language,vit,unet] only=[umup,umup-fp8,umup-mxfp8,umup-nvfp4]
    unitscale formats '+variants.mine=["unitscale.format=fp8","unitscale.recalibrate=[100]"]'

Every run of the job `pretrain` is that recipe with some overrides, the same text, steps and batches; the others are
small models of `cookbook/jobs` (a language model, a vision transformer, a U-Net), with the same overrides; formats in
blocks leave a U-Net's convolutions as they are. A finished run is one line in `runs.jsonl`; runs that are there with
the same settings are not run again. After a change of the package itself, delete that file. On a CPU the casts are real
and the products are made of upcast operands: what is measured is accuracy, and FP8 is slower here than no format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.checks import check_known
from lightning_unitscale.cookbook.quality.grid import measure_job
from lightning_unitscale.cookbook.runs import check
from lightning_unitscale.cookbook.sweeps.sweep import finish_runs, measure_pretraining, run_configuration
from lightning_unitscale.cookbook.tables import new_table, print_and_keep
from lightning_unitscale.errors import InputError

PRETRAIN = "pretrain"


@dataclass(frozen=True)
class VariantRun:
    """One training run: a job (`PRETRAIN` or a name in `cfg.small_jobs`), a name in `cfg.variants`, and a seed."""

    variant: str
    seed: int
    job: str = PRETRAIN

    def __str__(self) -> str:
        return f"{self.job}, {self.variant}, seed {self.seed}"

    def to_row(self) -> dict[str, Any]:
        """Its part of the line in `runs.jsonl`."""
        return asdict(self)


@recipe("formats")
def main(cfg: DictConfig) -> None:
    """Runs what is not finished yet, then prints the table and writes it to formats.txt."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    variants = chosen(cfg)
    check_known("jobs", cfg.jobs, [PRETRAIN, *cfg.small_jobs])
    tables = []
    for job in cfg.jobs:
        runs = [VariantRun(variant, seed, job) for seed in cfg.seeds for variant in variants]
        configurations = {run: configuration(cfg, run) for run in runs}
        if job == PRETRAIN:
            for run_cfg in configurations.values():
                check(run_cfg)
        measure = measure_pretraining if job == PRETRAIN else measure_job
        results = finish_runs(configurations, folder / "runs.jsonl", measure=measure, threads=cfg.threads)
        losses = {name: [results[VariantRun(name, seed, job)].held_out for seed in cfg.seeds] for name in variants}
        tables.append(loss_table(cfg, job, losses))
    print_and_keep(folder / "formats.txt", *tables)


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
    """The settings of `unitscale pretrain`, or of a small job, for one run.

    Raises:
        InputError: an override of the variant is not one of that recipe.
    """
    overrides = list(cfg.variants[run.variant])
    cfg = run_configuration(cfg, run.seed) if run.job == PRETRAIN else small_job(cfg, run)
    if any(override.startswith("unitscale.scheme=") for override in overrides):
        cfg.unitscale.hyperparameters = {}  # which were another scheme's
    try:
        cfg.merge_with_dotlist(overrides)
    except OmegaConfBaseException as error:
        raise InputError(f"variants.{run.variant}: {error}".replace("\n", " ")) from error
    return cfg


def small_job(cfg: DictConfig, run: VariantRun) -> DictConfig:
    """What `measure_job` takes: the job's own sizes and learning rate, all else as in `pretrain`."""
    job = OmegaConf.to_container(cfg.small_jobs[run.job], resolve=True)
    assert isinstance(job, dict)
    optimizer, trainer = cfg.optimizer.copy(), cfg.trainer.copy()
    optimizer.lr = job.pop("lr")
    epochs = {"max_epochs": 1, "max_steps": -1, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    return OmegaConf.create({
        "seed": run.seed,
        "job": job,
        "initial": "own",
        "optimizer": optimizer,
        "schedule": {"warmup_steps": job["steps"] // 10, "decay_steps": job["steps"], "final": 0.1},
        "trainer": OmegaConf.merge(trainer, epochs),
        "unitscale": cfg.unitscale.copy(),
    })  # fmt: skip


def loss_table(cfg: DictConfig, job: str, losses: Mapping[str, Sequence[float]]) -> Table:
    """One row for each variant: the losses of its seeds, their mean, and how far that is from the first variant's."""
    title = f"{job}: held-out loss, nats per byte, width {cfg.model.width}, after {cfg.trainer.max_steps} steps"
    if job != PRETRAIN:
        small = cfg.small_jobs[job]
        title = f"{job}: held-out score of {small._target_.rpartition('.')[2]}, after {small.steps} steps"
    seeds = [f"seed {seed}" for seed in cfg.seeds]
    table = new_table(title, ["variant"], [*seeds, "mean", "to the first"])
    reference = fmean(next(iter(losses.values())))
    for variant, of_seeds in losses.items():
        mean = fmean(of_seeds)  # infinite where one of them diverged
        cells = [f"{loss:.4f}" if math.isfinite(loss) else "diverged" for loss in of_seeds]
        change = f"{mean / reference - 1:+.2%}" if math.isfinite(mean) and math.isfinite(reference) else ""
        table.add_row(variant, *cells, f"{mean:.4f}", change)
    return table


if __name__ == "__main__":
    main()
