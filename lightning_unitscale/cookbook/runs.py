"""A training run: what is checked before it, what it is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_unitscale.checkpoint import read_checkpoint
from lightning_unitscale.cookbook.data import BOS, IGNORED, ByteText, decode, encode
from lightning_unitscale.cookbook.schedule import warm_up_and_decay
from lightning_unitscale.errors import InputError


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
