"""What unit scaling costs: training steps of all variants side by side, and the time of preparation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from omegaconf import DictConfig

from lightning_unitscale import unit_scale
from lightning_unitscale.cookbook.measuring.side_by_side import quartiles, ratios, time_side_by_side
from lightning_unitscale.cookbook.measuring.training_step import loss_of, new_model, random_batch, training_step

CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class StepCost:
    """What was measured of one variant; where it could not run, the error alone.

    Attributes:
        model, mode, variant: see `training_step`.
        seconds: quartiles of a step's time.
        ratio: quartiles of its time over the plain model's in the same round.
        samples: all its times.
    """

    model: str
    mode: str
    variant: str
    seconds: list[float] | None = None
    ratio: list[float] | None = None
    samples: list[float] | None = None
    error: str | None = None

    def to_row(self) -> dict[str, Any]:
        """What there is, as plain values."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class PreparationCost:
    """How long `unit_scale` takes, in eager steps of the plain model.

    Attributes:
        first: of the first preparation, which looks up the functions of torch if it is the first in the process.
        steps: quartiles of all.
    """

    model: str
    storage: str
    first: float
    steps: list[float]


def compare_steps(cfg: DictConfig, model: str, mode: str) -> list[StepCost]:
    """One row for each variant."""
    batch = random_batch(cfg)
    failures: dict[str, str] = {}
    steps: dict[str, Callable[[], float]] = {}
    # The package resets the compiler when it first runs, so it must be the first to.
    for variant in sorted(cfg.variants, key=lambda name: name != "unit-scaling"):
        try:
            step = training_step(cfg, model, mode, variant, batch)
            step()
        except Exception as error:
            if variant != "unit-scaling":
                raise
            failures[variant] = _one_line(error)
        else:
            steps[variant] = partial(_elapsed, step, CLOCKS[cfg.clock])
    times = time_side_by_side(steps, cfg.rounds, cfg.warm_up)

    rows = []
    for variant in cfg.variants:
        if variant in failures:
            rows.append(StepCost(model, mode, variant, error=failures[variant]))
            continue
        samples = times[variant]
        ratio = quartiles(ratios(samples, times["plain"]))
        rows.append(StepCost(model, mode, variant, quartiles(samples), ratio, samples))
    return rows


def time_preparation(cfg: DictConfig, model: str, storage: str) -> PreparationCost:
    """Alternates plain steps and preparations."""
    batch, clock = random_batch(cfg), CLOCKS[cfg.clock]
    plain = training_step(cfg, model, "eager", "plain", batch)
    for _ in range(cfg.warm_up):
        plain()
    steps, preparations = [], []
    for _ in range(cfg.preparations):
        steps.append(_elapsed(plain, clock))
        fresh = new_model(cfg, model)
        prepare = partial(unit_scale, fresh, lambda module: loss_of(module, batch), storage=storage)
        preparations.append(_elapsed(prepare, clock))
    step = statistics.median(steps)
    in_steps = [seconds / step for seconds in preparations]
    return PreparationCost(model, storage, in_steps[0], quartiles(in_steps))


def _elapsed(function: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    function()
    return clock() - begin


def _one_line(error: BaseException) -> str:
    """An error as the table shows it."""
    if isinstance(error, ModuleNotFoundError):
        return "not installed (pip install unit-scaling)"
    lines = str(error).strip().splitlines()[:2]  # the compiler names its cause in the second
    return f"{type(error).__name__}: {' '.join(lines)}"[:200]
