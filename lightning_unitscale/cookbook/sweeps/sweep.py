"""A sweep: pre-training runs that differ in some settings, one after another, each of them done once."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from lightning_unitscale.cookbook.runs import train
from lightning_unitscale.cookbook.sweeps.results import Result, RunT, append_result, read_results

CURVE_STEPS = 10  # training steps averaged into one point of a curve
DECIDING = ("seed", "model", "data", "task", "optimizer", "schedule", "unitscale", "trainer")


def finish_runs(
    configurations: Mapping[RunT, DictConfig], file: Path, threads: int | None, only_report: bool = False
) -> dict[RunT, Result[RunT]]:
    """Does the runs that are not in the file yet, and prints a line for each.

    Args:
        configurations: of the recipe `pretrain`, for each run.
        file: `runs.jsonl`; every finished run is written at once.
        threads: of each run; None for torch's own choice.
        only_report: do no run.

    Returns:
        The results of all runs that are finished, in the order of `configurations`.
    """
    keys = {run: settings_hash(cfg) for run, cfg in configurations.items()}
    known = read_results(file, keys)
    first = {key: run for run, key in reversed(keys.items())}  # runs with the same settings are one
    left = [] if only_report else [run for run, key in keys.items() if run not in known and first[key] == run]
    _prepare_process(threads)
    for number, run in enumerate(left, start=1):
        begin = time.perf_counter()
        held_out, curve = measure(configurations[run])
        result = Result(run, keys[run], held_out, curve, round(time.perf_counter() - begin, 1))
        append_result(file, result)
        print(f"[{number}/{len(left)}] {run}: {held_out:.3f} ({result.seconds:.0f} s)", flush=True)
    return read_results(file, keys)


def run_configuration(cfg: DictConfig, seed: int) -> DictConfig:
    """A copy of the sweep's settings for one of its runs, with validation after the last step alone."""
    cfg = cfg.copy()
    cfg.seed = seed
    cfg.trainer.val_check_interval = cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches
    return cfg


def settings_hash(cfg: DictConfig) -> str:
    """A hash of everything in the configuration that decides the result of a run."""
    relevant = OmegaConf.masked_copy(cfg, list(DECIDING))
    relevant.trainer.default_root_dir = None
    text = json.dumps(OmegaConf.to_container(relevant, resolve=True), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def measure(cfg: DictConfig) -> tuple[float, list[float]]:
    """Held-out loss (infinite where training diverged) and training curve of one run of the recipe `pretrain`."""
    curve = LossCurve()
    trainer = train(cfg, [curve])
    held_out = float(trainer.callback_metrics["val/loss"])
    return (held_out if math.isfinite(held_out) else math.inf), curve.points()


class LossCurve(pl.Callback):
    """Collects the training loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Called after every step."""
        self.losses.append(float(outputs["loss"]))

    def points(self) -> list[float]:
        """Means over consecutive steps."""
        starts = range(0, len(self.losses), CURVE_STEPS)
        return [round(fmean(self.losses[start : start + CURVE_STEPS]), 4) for start in starts]


def _prepare_process(threads: int | None) -> None:
    """For one training after another: with so many threads, and without Lightning's greetings."""
    if threads:
        torch.set_num_threads(threads)
    for name in ("pytorch_lightning", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
