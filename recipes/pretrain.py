"""Pre-train a model from random weights: a language model on text, or any task.

    unitscale pretrain                                   # = python recipes/pretrain.py
    unitscale pretrain experiment=detection              # or another task: see the table in recipes/README.md
    unitscale pretrain data=text data.path=~/notes       # your own text
    unitscale pretrain experiment=transfer               # learning rates that carry over to other widths
    unitscale pretrain ckpt_path=outputs/pretrain/…      # a run's folder: continue, exactly; other settings kept

The model and its LightningModule know nothing of unit scaling: the callback does all of it. While it trains,
`val/loss@100` is of the validation after step 100; `x_near_1_%` the share of layers whose input has a root mean square
within a factor of 4 of 1; with a format `snr_db` is the lowest signal-to-noise ratio of a cast, and `lost_%` the
largest share of an operand that one loses. recipes/README.md explains all that commands print.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.checks import say_shorter_warm_up
from lightning_unitscale.cookbook.data.ngrams import counted_loss
from lightning_unitscale.cookbook.data.token_text import TokenText
from lightning_unitscale.cookbook.run_report import RunReport
from lightning_unitscale.cookbook.runs import (
    callback_of,
    check,
    diverged_at_its_end,
    fit,
    leave,
    module_and_data,
    new_trainer,
    plain,
    show,
)
from lightning_unitscale.cookbook.tasks import Task
from lightning_unitscale.engine.record.spread_tensors import number_of_elements
from lightning_unitscale.monitor import ScaleMonitor, Snapshot, measure


@recipe("pretrain")
def main(cfg: DictConfig) -> float:
    """Trains, validates, writes samples and a report; returns the held-out loss (what a sweep minimizes)."""
    begin = time.perf_counter()
    check(cfg)  # everything that can be wrong with the input is found before any work is done
    say_shorter_warm_up(cfg)
    unitscale = instantiate(cfg.unitscale) if cfg.unitscale else None
    module, data = module_and_data(cfg)
    trainer = new_trainer(cfg, unitscale)
    sizes: dict[str, int] = getattr(data, "sizes", dict)()  # a data module of the user's own says none
    parameters = sum(map(number_of_elements, module.parameters()))
    title = f"pretrain: {cfg.model.config.model_type}, {parameters:,} parameters"
    words = ", ".join(f"{count:,} {name}" for name, count in sizes.items())
    report = RunReport(cfg, trainer, title=title, score="val/loss", data=words)

    stopped = fit(trainer, module, data, cfg.ckpt_path)
    scores: Mapping[str, float] = {
        name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")
    }
    if not stopped:
        (scores,) = trainer.validate(module, data, verbose=False)
        if cfg.task.get("test_part", True):  # else the test is on the text of the validation
            scores = {**scores, **trainer.test(module, data, verbose=False)[0]}
        stopped = diverged_at_its_end(trainer, cfg.optimizer.lr, scores["val/loss"])
    if trainer.is_global_zero:
        if unitscale and cfg.monitor and (monitor := callback_of(trainer, ScaleMonitor)).last:
            untouched(cfg, module, data, monitor.last.format).append_to(monitor.file)
        seconds = {"seconds": round(time.perf_counter() - begin, 1)}
        shown = show(module, data.val_dataloader(), Path(cfg.folder) / "report", plain(cfg.task))
        batches = trainer.global_step * trainer.accumulate_grad_batches
        seen = data.seen(batches) if isinstance(data, TokenText) else {}
        report.end(unitscale, stopped, {**scores, **counted_loss(data), **sizes, **seen, **seconds}, shown)
    if stopped:
        leave(trainer, stopped)
    return math.inf if stopped else scores["val/loss"]


def untouched(cfg: DictConfig, trained: Task, data: pl.LightningDataModule, format: str) -> Snapshot:
    """What the same model without unit scaling is like before its first step, to compare with."""
    batch = {name: tensor.to(trained.device) for name, tensor in next(iter(data.train_dataloader())).items()}
    pl.seed_everything(cfg.seed, verbose=False)
    twin = type(trained)(**trained.hparams).to(trained.device)
    return measure(twin, lambda module: module.loss(batch)[0], format, label="untouched")


if __name__ == "__main__":
    main()
