"""A LightningModule, its data and a quiet Trainer, for the tests that train."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from support.zoo_batches import Batch, next_token_batch
from support.zoo_modules import VOCAB, WIDTH, Block, FeedForward, merge_heads, split_heads

STEPS = 20
KNOWN: dict[str, Any] = {"enable_checkpointing": False, "max_epochs": 1000}


class Attention(nn.Module):
    """Its query weight is a parameter of its own, so that the factor of the logits can be folded into it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(project(x)) for project in (self.q, self.k, self.v))
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class Language(pl.LightningModule):
    """A one-block language model with BatchNorm and dropout, and a list of its losses."""

    def __init__(
        self,
        dropout: float = 0.0,
        batch_norm: bool = True,
        optimizer: str = "adamw",
        lr: float = 3e-3,
        schedule: bool = False,
        width: int = WIDTH,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(VOCAB, width)
        self.dropout = nn.Dropout(dropout)
        self.block = Block(Attention(width), FeedForward(width))
        self.norm = nn.BatchNorm1d(width) if batch_norm else nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB)
        self.losses: list[float] = []

    def forward(self, ids: Tensor) -> Tensor:
        x = self.block(self.dropout(self.embedding(ids)))
        return self.head(self.dropout(self.norm(x.flatten(0, 1))))

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self(batch["input_ids"]), batch["labels"].flatten())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch["input_ids"])

    def configure_optimizers(self) -> Any:
        lr = self.hparams["lr"]
        if self.hparams["optimizer"] == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(self.parameters(), lr=lr, momentum=0.9, weight_decay=0.1)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=lr)
        if not self.hparams["schedule"]:
            return optimizer
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Wrapped(Language):
    """Its block is compiled, or keeps no activations, where that is asked for."""

    checkpointing = compiled = False

    def configure_model(self) -> None:
        if self.compiled:
            self.block.compile(backend="aot_eager")
        if self.checkpointing:
            self.block.forward = partial(checkpoint, self.block.forward, use_reentrant=False)  # type: ignore[method-assign]


class ByStep(Language):
    """Batch and dropout masks depend on the step alone, so that a resumed run meets what the whole one did."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        torch.manual_seed(1000 + self.global_step)
        return super().training_step(next_token_batch(self.global_step), batch_idx)


def batches(count: int = 5, first: int = 0) -> DataLoader[Batch]:
    """Batches in order; an epoch has `count`."""
    return DataLoader([next_token_batch(first + seed) for seed in range(count)], batch_size=None)


def trainer(folder: Path | str, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(folder),
    }
    return pl.Trainer(**{**quiet, **KNOWN, **options}, callbacks=list(callbacks))


def fit(
    folder: Path | str,
    *callbacks: pl.Callback,
    module: pl.LightningModule | None = None,
    data: Iterable[Any] | None = None,
    **options: Any,
) -> pl.LightningModule:
    """Train from the same start every time; returns the module."""
    if module is None:
        module = build()
    torch.manual_seed(1)
    trainer(folder, *callbacks, **{"max_steps": STEPS, **options}).fit(module, data if data is not None else batches())
    return module


def build(**options: Any) -> Language:
    torch.manual_seed(0)
    return Language(**options)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    """Bit for bit."""
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    different = [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]
    assert not different
