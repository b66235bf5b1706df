"""Pre-train a language model on text, from random weights.

    unitscale pretrain                                   # = python recipes/pretrain.py
    unitscale pretrain data=text data.path=~/notes       # your own text
    unitscale pretrain experiment=transfer               # learning rates that carry over to other widths
    unitscale pretrain ckpt_path=outputs/…/last.ckpt     # continue

The model and its LightningModule know nothing of unit scaling: the callback does all of it.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.continuation import RandomNumbers
from lightning_unitscale.cookbook.data import BOS, ByteText
from lightning_unitscale.cookbook.interrupt import Interrupted, LastCheckpoint
from lightning_unitscale.cookbook.runs import CausalLM, check, new_module, text_data
from lightning_unitscale.monitor import Snapshot, measure
from lightning_unitscale.monitor.report import write_report

# ----------------------------------------------------------------------------------------------------------------------
# The model: any causal language model of transformers, and an ordinary LightningModule around it


# ----------------------------------------------------------------------------------------------------------------------
# The run


@recipe("pretrain")
def main(cfg: DictConfig) -> float:
    """Trains, validates, writes samples and a report; returns the held-out loss (what a sweep minimizes)."""
    begin = time.perf_counter()
    run_folder = Path(HydraConfig.get().runtime.output_dir)

    # Everything that can be wrong with the input is found before any work is done.
    check(cfg)
    unitscale = instantiate(cfg.unitscale) if cfg.unitscale else None
    monitor = instantiate(cfg.monitor) if cfg.monitor else None
    data = text_data(cfg)
    pl.seed_everything(cfg.seed, workers=True)
    module = new_module(cfg)

    last = LastCheckpoint(run_folder / "checkpoints" / "last.ckpt")
    callbacks = [
        *([unitscale] if unitscale else []),
        *([monitor] if monitor else []),
        ModelCheckpoint(
            run_folder / "checkpoints",
            filename="step-{step}",  # not "step=…", which Hydra could not read back in ckpt_path=…
            auto_insert_metric_name=False,
            every_n_train_steps=cfg.checkpoint_every,
            save_last=True,
            enable_version_counter=False,
        ),
        LearningRateMonitor(logging_interval="step"),
        PrintPlan(unitscale),
        RandomNumbers(),
        last,
    ]
    if cfg.trainer.enable_progress_bar:
        callbacks.append(Progress(leave=True))
    loggers = [instantiate(logger) for logger in cfg.logger.values()]
    trainer: pl.Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, _convert_="all")

    with suppress(Interrupted):
        trainer.fit(module, data, ckpt_path=cfg.ckpt_path)
    if last.interrupted:
        print(f"\nStopped at step {trainer.global_step}. Continue with: ckpt_path={last.path}")
        sys.exit(130)
    (scores,) = trainer.validate(module, data, verbose=False)
    if not trainer.is_global_zero:
        return scores["val/loss"]

    samples = module.sample(str(cfg.task.sample.prompt), cfg.task.sample.count, cfg.task.sample.temperature, cfg.seed)
    print("\n" + "\n\n".join(f"--- sample {number}\n{text}" for number, text in enumerate(samples, start=1)))

    metrics = {
        "held-out loss, nats per byte": scores["val/loss"],
        "held-out bits per byte": scores["val/bits_per_byte"],
        "held-out perplexity per byte": scores["val/perplexity"],
        "training bytes": int((data.training.tokens != BOS).sum()),
        "held-out bytes": int((data.held_out.tokens != BOS).sum()),
        "parameters": sum(p.numel() for p in module.parameters()),
        "steps": trainer.global_step,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    if unitscale and monitor and monitor.last:
        untouched(cfg, module, data, monitor.last.format).append_to(monitor.file)
    page = write_report(
        run_folder,
        title=f"pretrain: {cfg.model.config.model_type}, width {cfg.model.width}, depth {cfg.model.depth}",
        metrics=metrics,
        samples=samples,
        plan=unitscale.plan.summary() if unitscale else "no unit scaling (unitscale=none)",
    )
    print("\n" + "\n".join(f"{name:30} {value:>12,.6g}" for name, value in metrics.items()))
    print(f"\nreport {page}")
    return scores["val/loss"]


class PrintPlan(pl.Callback):
    """Shows what unit scaling does to each parameter, once, when the first step has shown the model."""

    def __init__(self, unitscale: Any) -> None:
        self.unitscale = unitscale

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Prints above the progress bar."""
        if self.unitscale is not None:
            _, _, table = self.unitscale.plan.summary().partition("\n")  # the callback has logged the first line
            pl_module.print(table)
            self.unitscale = None


class Progress(RichProgressBar):
    """Lightning's, without an epoch number: crops are drawn at random, so there are none."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"


def untouched(cfg: DictConfig, trained: CausalLM, data: ByteText, format: str) -> Snapshot:
    """What the same model without unit scaling is like before its first step, to compare with."""
    inputs, targets = (tensor.to(trained.device) for tensor in next(iter(data.train_dataloader())))
    pl.seed_everything(cfg.seed, verbose=False)
    twin = new_module(cfg).to(trained.device)
    return measure(twin, lambda module: module.loss((inputs, targets))[0], format, label="untouched")


if __name__ == "__main__":
    main()
