"""Pre-train a model from random weights: a language model on text, or any task.

    unitscale pretrain                                   # = python recipes/pretrain.py
    unitscale pretrain experiment=detection              # or another task: see the table in recipes/README.md
    unitscale pretrain data=text data.path=~/notes       # your own text
    unitscale pretrain experiment=transfer               # learning rates that carry over to other widths
    unitscale pretrain ckpt_path=outputs/…/last.ckpt     # continue

The model and its LightningModule know nothing of unit scaling: the callback does all of it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.callbacks import LastCheckpoint
from lightning_unitscale.cookbook.runs import callback_of, check, fit, module_and_data, new_trainer, plain, show
from lightning_unitscale.cookbook.tasks import Task
from lightning_unitscale.monitor import ScaleMonitor, Snapshot, measure
from lightning_unitscale.monitor.report import write_report


@recipe("pretrain")
def main(cfg: DictConfig) -> float:
    """Trains, validates, writes samples and a report; returns the held-out loss (what a sweep minimizes)."""
    begin = time.perf_counter()
    check(cfg)  # everything that can be wrong with the input is found before any work is done
    unitscale = instantiate(cfg.unitscale) if cfg.unitscale else None
    module, data = module_and_data(cfg)
    trainer = new_trainer(cfg, unitscale)

    if not fit(trainer, module, data, cfg.ckpt_path):
        last = callback_of(trainer, LastCheckpoint)
        print(f"\nStopped at step {trainer.global_step}. Continue with: ckpt_path={last.path}")
        sys.exit(130)
    (scores,) = trainer.validate(module, data, verbose=False)
    if cfg.task.get("test_part", True):  # else the test is on the text of the validation
        scores = {**scores, **trainer.test(module, data, verbose=False)[0]}
    if not trainer.is_global_zero:
        return scores["val/loss"]

    metrics = {
        **scores,
        **getattr(data, "sizes", dict)(),  # a data module of the user's own says none
        "parameters": sum(p.numel() for p in module.parameters()),
        "steps": trainer.global_step,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    shown = show(module, data.val_dataloader(), Path(cfg.folder) / "report", plain(cfg.task))
    if unitscale and cfg.monitor and (monitor := callback_of(trainer, ScaleMonitor)).last:
        untouched(cfg, module, data, monitor.last.format).append_to(monitor.file)
    page = write_report(
        Path(cfg.folder),
        title=f"pretrain: {cfg.model.config.model_type}, {metrics['parameters']:,} parameters",
        metrics=metrics,
        shown=shown,
        plan=unitscale.plan.summary() if unitscale else "no unit scaling (unitscale=none)",
    )
    print("\n" + "\n".join(f"{name:30} {value:>12,.6g}" for name, value in metrics.items()))
    print(f"\nreport {page}")
    return scores["val/loss"]


def untouched(cfg: DictConfig, trained: Task, data: pl.LightningDataModule, format: str) -> Snapshot:
    """What the same model without unit scaling is like before its first step, to compare with."""
    batch = {name: tensor.to(trained.device) for name, tensor in next(iter(data.train_dataloader())).items()}
    pl.seed_everything(cfg.seed, verbose=False)
    twin = type(trained)(**trained.hparams).to(trained.device)
    return measure(twin, lambda module: module.loss(batch)[0], format, label="untouched")


if __name__ == "__main__":
    main()
