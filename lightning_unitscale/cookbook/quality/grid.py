"""The runs of `unitscale quality`: job × variant × learning rate × seed, and how one of them is made."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_unitscale.cookbook.checks import check_known
from lightning_unitscale.cookbook.jobs.job import Job
from lightning_unitscale.cookbook.learning_rates.findings import best_of
from lightning_unitscale.cookbook.learning_rates.grid import RateRun
from lightning_unitscale.cookbook.learning_rates.growth import rate_beyond
from lightning_unitscale.cookbook.quality.step_time import StepTime
from lightning_unitscale.cookbook.runs import plain
from lightning_unitscale.cookbook.sweeps.results import Result
from lightning_unitscale.cookbook.sweeps.sweep import LossCurve, Outcome
from lightning_unitscale.cookbook.wrong_values import check_whole_numbers
from lightning_unitscale.errors import InputError, UnitScalingError


def chosen_jobs(cfg: DictConfig) -> list[str]:
    """The names of the jobs to run, in the order of the configuration.

    Raises:
        InputError: none is chosen, one is not known, or one of another name.
    """
    known = [str(name) for name in cfg.jobs]
    wanted = known if cfg.quality.jobs is None else [str(name) for name in cfg.quality.jobs]
    check_known("quality.jobs", wanted, known)
    if not wanted:
        raise InputError(f"quality.jobs is empty: choose from {', '.join(known)}, or null for all")
    return [name for name in known if name in wanted]


def planned_runs(cfg: DictConfig) -> list[RateRun]:
    """The grid, one seed after the other and job by job, so that an early stop leaves whole rows.

    With `quality.near` that of the first seed alone: `runs_near` has the others.
    """
    return [
        RateRun(str(variant), "job", job, 2.0**exponent, seed)
        for seed in _seeds(cfg)
        for job in chosen_jobs(cfg)
        for variant, settings in cfg.variants.items()
        for exponent in settings.rates
    ]


def runs_beyond(cfg: DictConfig, results: Sequence[Result[RateRun]]) -> list[RateRun]:
    """Where a variant's best is at the edge of what was tried: the next rate beyond, for every seed of the grid.

    "drop-in" has the rates of "standard", and is not led beyond by its own best.
    """
    runs = []
    for job in chosen_jobs(cfg):
        for variant in cfg.variants:
            rate = rate_beyond(results, variant, job) if variant != "drop-in" else None
            if rate is None:
                continue
            names = [variant, *(["drop-in"] if variant == "standard" and "drop-in" in cfg.variants else [])]
            runs += [RateRun(name, "job", job, rate, seed) for seed in _seeds(cfg) for name in names]
    return runs


def runs_near(cfg: DictConfig, results: Sequence[Result[RateRun]]) -> list[RateRun]:
    """Every seed at each variant's best rate so far and its neighbours; none without `quality.near`.

    The best is the first seed's, and once all seeds have been run somewhere, that of their mean.
    """
    return [
        RateRun(variant, "job", job, best.learning_rate * 2.0**step, seed)
        for seed in (cfg.quality.seeds if cfg.quality.near is not None else ())
        for job in chosen_jobs(cfg)
        for variant in cfg.variants
        if (best := best_of(results, variant, job)) is not None and math.isfinite(best.loss)
        for step in range(-cfg.quality.near, cfg.quality.near + 1)
    ]


def _seeds(cfg: DictConfig) -> list[int]:
    """Those that are run at every rate."""
    return list(cfg.quality.seeds if cfg.quality.near is None else cfg.quality.seeds[:1])


def configuration(cfg: DictConfig, run: RateRun) -> DictConfig:
    """What `measure_job` takes."""
    cfg, variant = cfg.copy(), cfg.variants[run.parametrization]
    cfg.seed, cfg.optimizer.lr, cfg.job = run.seed, run.learning_rate, cfg.jobs[run.value]
    cfg.initial, cfg.unitscale = variant.initial, variant.unitscale
    return cfg


def new_job(cfg: DictConfig) -> Job:
    """The job of a run's configuration, with fresh weights from the global seed."""
    job = instantiate(
        cfg.job, optimizer=plain(cfg.optimizer), schedule=plain(cfg.schedule), _recursive_=False, _convert_="all"
    )
    if not isinstance(job, Job):
        raise InputError(
            f"{cfg.job._target_} is a {type(job).__name__}; a job of unitscale quality is a subclass of Job"
        )
    if cfg.initial == "fan_in":
        from lightning_unitscale.cookbook.fan_in import initialise_by_fan_in  # needs transformers

        initialise_by_fan_in(job, depth=job.depth, branch_outputs=job.branch_outputs, kept=job.kept)
    return job


def check_jobs(cfg: DictConfig) -> None:
    """Builds every chosen job once.

    Raises:
        InputError: a package is missing, a setting is no size, or a variant's initialisation is not known.
    """
    check_known("variants.*.initial", {variant.initial for variant in cfg.variants.values()}, ("own", "fan_in"))
    for variant, settings in cfg.variants.items():
        if not settings.rates:
            raise InputError(f"variants.{variant}.rates is empty: give exponents k of learning rates 2^k")
    for name in chosen_jobs(cfg):
        check_whole_numbers(cfg, *(f"jobs.{name}.{size}" for size in ("width", "depth", "steps", "batch_size")))
        module = str(cfg.jobs[name]._target_).rpartition(".")[0]
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise InputError(
                f"jobs.{name} can't be imported: {error}. Install it (pip install 'lightning-unitscale[recipes]'), or "
                f"choose other jobs: quality.jobs=[…]"
            ) from error
        first, *_ = cfg.variants
        new_job(configuration(cfg, RateRun(first, "job", name, 1.0, 0))).examples()


def measure_job(cfg: DictConfig) -> Outcome:
    """Trains a job, and scores it before and after; a refusal by unit scaling is a result, and its reason is kept."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    job, curve, step_time = new_job(cfg), LossCurve(), StepTime()
    scaling = [instantiate(cfg.unitscale)] if cfg.unitscale else []
    trainer: pl.Trainer = instantiate(
        cfg.trainer,
        callbacks=[curve, step_time, *scaling],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        _convert_="all",
    )
    (before,) = trainer.validate(job, verbose=False)
    try:
        trainer.fit(job)
    except UnitScalingError as refusal:
        return Outcome(math.inf, before["val/score"], error=str(refusal))
    after = float(trainer.callback_metrics["val/score"])
    return Outcome(
        after if math.isfinite(after) else math.inf,
        before["val/score"],
        first_loss=curve.first,
        curve=curve.points(),
        step_seconds=step_time.seconds,
    )
