"""The runs of a sweep of learning rates: parametrization × a setting's value × learning rate × seed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_unitscale.cookbook.sweeps.sweep import run_configuration


@dataclass(frozen=True)
class RateRun:
    """One training run.

    Attributes:
        parametrization: "standard" (the untouched model), "fan-in" (that one, its weights drawn by fan-in), "umup",
            "drop-in" (`lr_units="standard"`), ….
        axis: what else is varied: "width", "depth", "job", ….
        value: of that.
    """

    parametrization: str
    axis: str
    value: int | str
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        rate = readable_rate(self.learning_rate)
        return f"{self.parametrization:8} {self.axis} {self.value:>4}, learning rate {rate:>5}, seed {self.seed}"

    def to_row(self) -> dict[str, Any]:
        """Its part of the line in `runs.jsonl`."""
        return {"run": asdict(self)}


def planned_runs(sweep: DictConfig) -> list[RateRun]:
    """All runs, one seed after the other, small values first, so that an early stop leaves whole tables."""
    runs = []
    for seed in sweep.seeds:
        for value in sweep.points:
            runs += [RateRun("standard", sweep.axis, value, 2.0**k, seed) for k in sweep.standard]
            runs += [RateRun("fan-in", sweep.axis, value, 2.0**k, seed) for k in sweep.fan_in]
            runs += [RateRun("umup", sweep.axis, value, 2.0**k, seed) for k in sweep.umup]
        for value in sweep.drop_in.points:
            for rate in sweep.drop_in.learning_rates:
                runs += [RateRun(name, sweep.axis, value, rate, seed) for name in ("standard", "drop-in")]
    return list(dict.fromkeys(runs))


def configuration(cfg: DictConfig, run: RateRun) -> DictConfig:
    """The settings of `unitscale pretrain` for one run."""
    cfg = cfg.copy()
    OmegaConf.update(cfg, cfg.sweep.key, run.value)
    cfg.optimizer.lr = run.learning_rate
    cfg = run_configuration(cfg, run.seed)
    if run.parametrization in ("standard", "fan-in"):
        cfg.unitscale = None
        if run.parametrization == "fan-in":
            cfg.model.initial = "fan_in"
    elif run.parametrization == "drop-in":
        cfg.unitscale.lr_units = "standard"
    else:
        cfg.unitscale.lr_units = "umup"
    return cfg


def is_power_of_two(rate: float) -> bool:
    """Whether it lies on the grid, which has a factor of 2 between neighbours."""
    return math.log2(rate).is_integer()


def readable_rate(rate: float) -> str:
    """A power of two as such."""
    return f"2^{math.log2(rate):.0f}" if is_power_of_two(rate) else f"{rate:g}"
