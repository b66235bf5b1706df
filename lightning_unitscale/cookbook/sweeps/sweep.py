"""A sweep: training runs that differ in some settings, each of them done once, one or more at a time."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from lightning_unitscale.cookbook.config import register
from lightning_unitscale.cookbook.logs import LIGHTNING
from lightning_unitscale.cookbook.runs import train
from lightning_unitscale.cookbook.sweeps.results import Result, RunT, append_result, read_results
from lightning_unitscale.errors import InputError

CURVE_STEPS = 10  # training steps averaged into one point of a curve
DECIDING = ("seed", "model", "data", "task", "job", "initial", "optimizer", "schedule", "unitscale", "trainer")


@dataclass(frozen=True)
class Outcome:
    """What a run leaves; see `Result` for each."""

    held_out: float
    untrained: float | None = None
    first_loss: float | None = None
    curve: list[float | None] = field(default_factory=list)
    error: str = ""
    step_seconds: float | None = field(default=None, compare=False)
    scores: dict[str, float] = field(default_factory=dict)


Measure = Callable[[DictConfig], Outcome]


class LossCurve(pl.Callback):
    """Collects the training loss of each step that returns one."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Called after every step."""
        if isinstance(outputs, Mapping) and "loss" in outputs:
            self.losses.append(float(outputs["loss"]))

    @property
    def first(self) -> float | None:
        """The loss of the first step."""
        return _finite(self.losses[0]) if self.losses else None

    def points(self) -> list[float | None]:
        """Means over consecutive steps."""
        starts = range(0, len(self.losses), CURVE_STEPS)
        return [_finite(fmean(self.losses[start : start + CURVE_STEPS])) for start in starts]


def finite_or_infinite(loss: float) -> float:
    """A loss that is no number counts as an infinite one."""
    return loss if math.isfinite(loss) else math.inf


def _finite(loss: float) -> float | None:
    return round(loss, 4) if math.isfinite(loss) else None


def measure_pretraining(cfg: DictConfig) -> Outcome:
    """One run of the recipe `pretrain`."""
    curve = LossCurve()
    trainer = train(cfg, [curve])
    held_out = finite_or_infinite(float(trainer.callback_metrics["val/loss"]))
    return Outcome(held_out, first_loss=curve.first, curve=curve.points())


def finish_runs(
    configurations: Mapping[RunT, DictConfig],
    file: Path,
    *,
    measure: Measure = measure_pretraining,
    threads: int | None = None,
    processes: int = 1,
    only_report: bool = False,
) -> dict[RunT, Result[RunT]]:
    """Does the runs that are not in the file yet, and prints a line for each.

    Args:
        configurations: for each run, what `measure` takes; of the recipe `pretrain` by default.
        file: `runs.jsonl`; every finished run is written at once.
        measure: makes the run; where there is more than one process, a function that they can import.
        threads: of each run; None for torch's own choice.
        processes: runs at a time.
        only_report: do no run.

    Returns:
        The results of all runs that are finished, in the order of `configurations`.

    Raises:
        InputError: there are no runs, or `processes` is no positive whole number.
    """
    if not configurations:
        raise InputError("the sweep is empty: nothing was chosen to run, or there is no seed or no learning rate")
    if not isinstance(processes, int) or processes < 1:
        raise InputError(f"processes={processes} must be a positive whole number")
    keys = {run: settings_hash(cfg) for run, cfg in configurations.items()}
    known = read_results(file, keys)
    first = {key: run for run, key in reversed(keys.items())}  # runs with the same settings are one
    left = [] if only_report else [run for run, key in keys.items() if run not in known and first[key] == run]
    begin = {run: (measure, _deciding(configurations[run]), threads) for run in left}
    for number, (run, (measured, seconds)) in enumerate(_measured(begin, processes), start=1):
        result = Result(run, keys[run], seconds=seconds, **asdict(measured))
        append_result(file, result)
        note = f" {result.error}" if result.error else ""
        print(f"[{number}/{len(left)}] {run}: {result.held_out:.3f} ({seconds:.0f} s){note}", flush=True)
    return read_results(file, keys)


def _measured(
    begin: Mapping[RunT, tuple[Measure, DictConfig, int | None]], processes: int
) -> Iterator[tuple[RunT, tuple[Outcome, float]]]:
    """Each run as it is finished, with the seconds that it took."""
    if processes == 1:
        for run, arguments in begin.items():
            yield run, _measure_one(*arguments)
        return
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        runs = {pool.submit(_measure_one, *arguments): run for run, arguments in begin.items()}
        try:
            for future in as_completed(runs):
                yield runs[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # after Ctrl-C, what runs comes to its end and no more begins


def _measure_one(measure: Measure, cfg: DictConfig, threads: int | None) -> tuple[Outcome, float]:
    """One run, in this process."""
    register()
    _prepare_process(threads)
    begin = time.perf_counter()
    measured = measure(cfg)
    return measured, round(time.perf_counter() - begin, 1)


def run_configuration(cfg: DictConfig, seed: int) -> DictConfig:
    """A copy of the sweep's settings for one of its runs, with validation after the last step alone."""
    cfg = cfg.copy()
    cfg.seed = seed
    cfg.trainer.val_check_interval = cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches
    return cfg


def settings_hash(cfg: DictConfig) -> str:
    """A hash of everything in the configuration that decides the result of a run."""
    text = json.dumps(OmegaConf.to_container(_deciding(cfg)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _deciding(cfg: DictConfig) -> DictConfig:
    """What decides the result of a run, as plain values: another process can take it, and makes the same run of it."""
    cfg = cfg.copy()
    cfg.trainer.default_root_dir = None  # a run of a sweep writes nothing
    nodes = {key: cfg[key] for key in DECIDING if key in cfg}
    return OmegaConf.create({
        key: OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        for key, node in nodes.items()
    })  # fmt: skip


def _prepare_process(threads: int | None) -> None:
    """For one training after another: with so many threads, and without Lightning's greetings."""
    if threads:
        torch.set_num_threads(threads)
    for name in LIGHTNING:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
