"""The runs of `unitscale tasks`: task × variant × learning rate × seed, and how one of them is made.

    standard    the untouched model: the whole grid with the first seed, its best rate with the others
    umup        the same, at rates in u-μP's units
    drop-in     UnitScaling(), at the rate that was the untouched model's best

The best is chosen on the validation examples, by the score that the task monitors; what is compared is the test score.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import hydra
from omegaconf import DictConfig, OmegaConf

from lightning_unitscale.cookbook.learning_rates.findings import best_of
from lightning_unitscale.cookbook.learning_rates.grid import RateRun
from lightning_unitscale.cookbook.learning_rates.growth import rate_beyond
from lightning_unitscale.cookbook.runs import train
from lightning_unitscale.cookbook.sweeps.results import Result
from lightning_unitscale.cookbook.sweeps.sweep import LossCurve, Outcome, finite_or_infinite, run_configuration
from lightning_unitscale.errors import InputError, UnitScalingError

UNTOUCHED, DROP_IN = "standard", "drop-in"
Results = Sequence[Result[RateRun]]


def first_runs(cfg: DictConfig) -> list[RateRun]:
    """The grid of every task with the first seed."""
    return [
        _run(variant, task, 2.0**exponent, cfg.seeds[0])
        for task in cfg.tasks
        for variant, settings in cfg.variants.items()
        for exponent in settings.rates
    ]


def runs_beyond(cfg: DictConfig, results: Results) -> list[RateRun]:
    """Where a best is at the edge of its grid: the next rate."""
    return [
        _run(variant, task, rate, cfg.seeds[0])
        for task in cfg.tasks
        for variant in cfg.variants
        if cfg.variants[variant].rates and (rate := rate_beyond(results, variant, task)) is not None
    ]


def last_runs(cfg: DictConfig, results: Results) -> list[RateRun]:
    """The other seeds at each variant's best rate, and the drop-in at the untouched model's."""
    runs = []
    for task in cfg.tasks:
        rates = {variant: best_of(results, variant, task) for variant in cfg.variants}
        rates[DROP_IN] = rates.get(UNTOUCHED)
        for variant in cfg.variants:
            if (best := rates[variant]) is not None:
                runs += [_run(variant, task, best.learning_rate, seed) for seed in cfg.seeds]
    return runs


def _run(variant: object, task: str, rate: float, seed: int) -> RateRun:
    return RateRun(str(variant), "task", task, rate, seed)


def configuration(cfg: DictConfig, run: RateRun) -> DictConfig:
    """The settings of `unitscale pretrain experiment=<task>` for one run."""
    overrides = [*cfg.variants[run.parametrization].settings, *cfg.settings, f"optimizer.lr={run.learning_rate}"]
    composed = hydra.compose("pretrain", overrides=[f"experiment={run.value}", *overrides])
    OmegaConf.set_struct(composed, False)
    if run.parametrization == UNTOUCHED:
        composed.unitscale = None  # an experiment may have left arguments for one there
    return run_configuration(composed, run.seed)


def added(
    cfg: DictConfig, runs: Iterable[RateRun], configurations: Mapping[RateRun, DictConfig]
) -> dict[RateRun, DictConfig]:
    """The configurations with those of more runs."""
    return {**configurations, **{run: configuration(cfg, run) for run in runs if run not in configurations}}


def score_of(cfg: DictConfig) -> tuple[str, str]:
    """Name of the score by which runs of this configuration are compared, and whether "min" or "max" is better."""
    score = cfg.task.get("score") or {"name": cfg.task.monitor.replace("val/", "test/", 1), "mode": cfg.task.mode}
    if score["mode"] not in ("min", "max"):
        raise InputError(f"task.score.mode={score['mode']} is not known; choose min or max")
    return str(score["name"]), str(score["mode"])


def measure_task(cfg: DictConfig) -> Outcome:
    """Trains, scores by what the task monitors (the negative where more is better), and tests.

    A refusal by unit scaling is a result, and its reason is kept.
    """
    curve = LossCurve()
    try:
        trainer = train(cfg, [curve])
    except InputError:
        raise
    except UnitScalingError as refusal:
        return Outcome(math.inf, error=str(refusal))
    monitored = float(trainer.callback_metrics[cfg.task.monitor])
    (tested,) = trainer.test(trainer.lightning_module, trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
    return Outcome(
        finite_or_infinite(-monitored if cfg.task.mode == "max" else monitored),
        first_loss=curve.first,
        curve=curve.points(),
        scores={name: float(value) for name, value in tested.items() if math.isfinite(value)},
    )
