"""Variants side by side, as `unitscale formats` compares them: overrides of a job by name, each with several seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table

from lightning_unitscale.cookbook.sweeps.sweep import run_configuration
from lightning_unitscale.cookbook.tables import new_table
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
