"""Pre-train a language model on text, from random weights.

    unitscale pretrain                                   # = python recipes/pretrain.py
    unitscale pretrain data=text data.path=~/notes       # your own text
    unitscale pretrain experiment=transfer               # learning rates that carry over to other widths
    unitscale pretrain ckpt_path=outputs/…/last.ckpt     # continue, exactly; other settings are kept

The model and its LightningModule know nothing of unit scaling: the callback does all of it.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_unitscale import UnitScaling
from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.callbacks import Interrupted, Stopped
from lightning_unitscale.cookbook.data import TokenText
from lightning_unitscale.cookbook.data.ngrams import bigram_loss
from lightning_unitscale.cookbook.run_record import in_words, run_facts, untouched_twin
from lightning_unitscale.cookbook.runs import callback_of, check, fit, new_module, new_trainer, text_data
from lightning_unitscale.cookbook.tasks import LanguageModeling
from lightning_unitscale.monitor import ScaleMonitor, Snapshot, measure
from lightning_unitscale.monitor.readable import readable
from lightning_unitscale.monitor.report import write_report

SCORES = {
    "loss": "held-out loss, nats per byte",
    "bits_per_byte": "held-out bits per byte",
    "perplexity": "held-out perplexity per byte",
}


@recipe("pretrain")
def main(cfg: DictConfig) -> float:
    """Trains, validates, writes samples and a report; returns the held-out loss (what a sweep minimizes)."""
    begin = time.perf_counter()
    check(cfg)  # everything that can be wrong with the input is found before any work is done
    unitscale = instantiate(cfg.unitscale) if cfg.unitscale else None
    data = text_data(cfg)
    pl.seed_everything(cfg.seed, workers=True)
    module = new_module(cfg)
    trainer = new_trainer(cfg, unitscale)

    stopped = fit(trainer, module, data, cfg.ckpt_path)
    if not stopped:
        trainer.validate(module, data, verbose=False)
    held_out = float(trainer.callback_metrics.get("val/loss", math.nan))
    if trainer.is_global_zero:
        if stopped:
            print(f"\n{stopped}")
        if unitscale and cfg.monitor and (monitor := callback_of(trainer, ScaleMonitor)).last:
            untouched(cfg, module, data, monitor.last.format).append_to(monitor.file)
        report(cfg, trainer, data, unitscale, stopped, time.perf_counter() - begin)
    if isinstance(stopped, Interrupted):
        sys.exit(130)
    return math.inf if stopped else held_out


def report(
    cfg: DictConfig,
    trainer: pl.Trainer,
    data: TokenText,
    unitscale: UnitScaling | None,
    stopped: Stopped | None,
    seconds: float,
) -> None:
    """Prints samples and numbers and writes the page, of a run that was stopped too."""
    module: LanguageModeling = trainer.lightning_module  # type: ignore[assignment]
    wanted = cfg.task.sample
    samples = module.sample(str(wanted.prompt), wanted.count, wanted.temperature, cfg.seed)
    print("\n" + "\n\n".join(f"--- sample {number}\n{text}" for number, text in enumerate(samples, start=1)))
    training, held_out = (int((part.tokens != data.boundary).sum()) for part in (data.training, data.validation))
    logged = trainer.callback_metrics
    scores = {name: float(logged[f"val/{name}"]) for name in SCORES if f"val/{name}" in logged}
    metrics = {
        **{SCORES[name]: value for name, value in scores.items()},
        f"{SCORES['loss']}, of counted pairs of bytes": bigram_loss(
            data.training.tokens, data.validation.tokens, data.boundary + 1
        ),
        "training bytes": training,
        "held-out bytes": held_out,
        "parameters": sum(p.numel() for p in module.parameters()),
        "steps": trainer.global_step,
        "seconds": round(seconds, 1),
    }
    page = write_report(
        Path(cfg.folder),
        title=f"pretrain: {cfg.model.config.model_type}, width {cfg.model.width}, depth {cfg.model.depth}",
        ending=str(stopped or "finished"),
        score=SCORES["loss"],
        metrics=metrics,
        facts=run_facts(cfg, trainer, f"{training:,} bytes of text, {held_out:,} more held out"),
        scaling=in_words(unitscale.plan if unitscale else None),
        samples=samples,
        plan=unitscale.plan.summary() if unitscale and unitscale.plan else "no unit scaling (unitscale=none)",
        untouched=untouched_twin(Path(cfg.folder)),
    )
    print("\n" + "\n".join(f"{name:52} {readable(value):>12}" for name, value in metrics.items()))
    print(f"\nreport {page}")


def untouched(cfg: DictConfig, trained: LanguageModeling, data: TokenText, format: str) -> Snapshot:
    """What the same model without unit scaling is like before its first step, to compare with."""
    batch = {name: tensor.to(trained.device) for name, tensor in next(iter(data.train_dataloader())).items()}
    pl.seed_everything(cfg.seed, verbose=False)
    twin = new_module(cfg).to(trained.device)
    return measure(twin, lambda module: module.loss(batch)[0], format, label="untouched")


if __name__ == "__main__":
    main()
