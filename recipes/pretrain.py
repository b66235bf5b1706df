"""Pre-train a language model on text, from random weights.

    unitscale pretrain                                   # = python recipes/pretrain.py
    unitscale pretrain data=text data.path=~/notes       # your own text
    unitscale pretrain experiment=transfer               # learning rates that carry over to other widths
    unitscale pretrain ckpt_path=outputs/…/last.ckpt     # continue

The model and its LightningModule know nothing of unit scaling: the callback does all of it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_unitscale.checkpoint import read_checkpoint
from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.continuation import RandomNumbers
from lightning_unitscale.cookbook.data import BOS, IGNORED, ByteText, decode, encode
from lightning_unitscale.cookbook.interrupt import Interrupted, LastCheckpoint
from lightning_unitscale.cookbook.schedule import warm_up_and_decay
from lightning_unitscale.errors import InputError
from lightning_unitscale.monitor import Record, measure
from lightning_unitscale.monitor.page import write_report

# ----------------------------------------------------------------------------------------------------------------------
# The model: any causal language model of transformers, and an ordinary LightningModule around it


class CausalLM(pl.LightningModule):
    """Predicts the next byte. All arguments are plain containers, so a checkpoint alone can rebuild it."""

    def __init__(self, model: dict[str, Any], optimizer: dict[str, Any], schedule: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model))
        self.optimizer = optimizer
        self.schedule = schedule
        self.held_out_loss = MeanMetric()
        self.perplexity = Perplexity(ignore_index=IGNORED)

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The mean loss in nats per byte, and the logits."""
        inputs, targets = batch  # both [batch, sequence]
        logits = self.model(input_ids=inputs, use_cache=False).logits  # [batch, sequence, vocabulary]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED), logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One batch of random crops."""
        loss, _ = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """One batch of held-out windows; every byte of the held-out text counts once."""
        loss, logits = self.loss(batch)
        targets = batch[1]
        self.held_out_loss.update(loss, weight=(targets != IGNORED).sum())
        self.perplexity.update(logits, targets)

    def on_validation_epoch_end(self) -> None:
        """Loss, perplexity and bits, all per byte."""
        loss = self.held_out_loss.compute()
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)
        self.log("val/bits_per_byte", loss / math.log(2), sync_dist=True)
        self.log("val/perplexity", self.perplexity.compute(), sync_dist=True)
        self.held_out_loss.reset()
        self.perplexity.reset()

    def configure_optimizers(self) -> Any:
        """The configured optimizer; its learning rate rises linearly, then falls linearly."""
        optimizer = instantiate(self.optimizer, params=self.parameters())
        scheduler = warm_up_and_decay(optimizer, **self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @torch.inference_mode()
    def sample(self, prompt: str, count: int, temperature: float, seed: int) -> list[str]:
        """Texts that begin with the prompt and fill the context, generated with a KV cache."""
        self.eval()
        length = self.model.config.max_position_embeddings
        tokens = encode(prompt.encode()).to(self.device)  # [prompt]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            texts = self.model.generate(
                tokens.expand(count, -1),
                attention_mask=torch.ones_like(tokens).expand(count, -1),
                max_length=length,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                suppress_tokens=[BOS],
                pad_token_id=BOS,
            )
        return [
            "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in decode(t))
            for t in texts
        ]


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


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that would fail late or obscurely."""
    for key in ("trainer.max_steps", "data.batch_size", "task.sequence_length", "model.width", "model.depth"):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{key}={value} must be a positive whole number")
    if not isinstance(cfg.optimizer.lr, (int, float)) or cfg.optimizer.lr <= 0:
        raise InputError(f"optimizer.lr={cfg.optimizer.lr} must be a positive number")
    if cfg.model.width % cfg.model.head_width:
        raise InputError(
            f"model.width={cfg.model.width} is not a multiple of model.head_width={cfg.model.head_width}; "
            "change one of them"
        )
    prompt = len(str(cfg.task.sample.prompt).encode())
    if prompt > cfg.task.sequence_length - 2:
        raise InputError(f"task.sample.prompt has {prompt} bytes; there is room for {cfg.task.sequence_length - 2}")
    if cfg.ckpt_path and not Path(cfg.ckpt_path).is_file():
        raise InputError(f"ckpt_path={cfg.ckpt_path}: no such file (looked in {Path.cwd()})")
    if cfg.ckpt_path:
        read_checkpoint(cfg.ckpt_path)


def text_data(cfg: DictConfig) -> ByteText:
    """The text of this configuration."""
    return ByteText(
        instantiate(cfg.data.documents),
        sequence_length=cfg.task.sequence_length,
        batch_size=cfg.data.batch_size,
        steps=cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches,
        held_out=cfg.data.held_out,
        seed=cfg.seed,
        workers=cfg.data.workers,
    )


def new_module(cfg: DictConfig) -> CausalLM:
    """The module of this configuration, with fresh weights from the global seed."""
    parts: Any = [
        OmegaConf.to_container(part, resolve=True) for part in (cfg.model.config, cfg.optimizer, cfg.schedule)
    ]
    return CausalLM(*parts)


def train(cfg: DictConfig, callbacks: Sequence[pl.Callback] = ()) -> pl.Trainer:
    """A run without its logs, checkpoints and report, for other recipes; its last held-out loss is `val/loss`."""
    data = text_data(cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    module = new_module(cfg)
    trainer: pl.Trainer = instantiate(
        cfg.trainer,
        callbacks=[*callbacks, *([instantiate(cfg.unitscale)] if cfg.unitscale else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        _convert_="all",
    )
    trainer.fit(module, data)
    return trainer


def train_base(settings: Sequence[str], file: Path) -> float:
    """A model for other recipes to start from; writes its checkpoint and returns its held-out loss.

    Args:
        settings: overrides of `unitscale pretrain`.
        file: the checkpoint.
    """
    cfg = hydra.compose("pretrain", overrides=list(settings))
    check(cfg)
    trainer = train(cfg)
    trainer.save_checkpoint(file, weights_only=False)
    return float(trainer.callback_metrics["val/loss"])


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


def untouched(cfg: DictConfig, trained: CausalLM, data: ByteText, format: str) -> Record:
    """What the same model without unit scaling is like before its first step, to compare with."""
    inputs, targets = (tensor.to(trained.device) for tensor in next(iter(data.train_dataloader())))
    pl.seed_everything(cfg.seed, verbose=False)
    twin = new_module(cfg).to(trained.device)
    return measure(twin, lambda module: module.loss((inputs, targets))[0], format, label="untouched")


if __name__ == "__main__":
    main()
