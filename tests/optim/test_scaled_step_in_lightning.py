"""Multipliers in a Trainer: its schedulers, monitor, clipping, checkpoints and BackboneFinetuning."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BackboneFinetuning, LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger
from support.split_by_hand import (
    OPTIMIZERS,
    SCALES,
    ByHand,
    Plan,
    assert_same,
    network,
    two_groups,
    weights,
)
from torch import Tensor
from torch.optim import lr_scheduler as schedules

from lightning_unitscale.optim.scale_learning_rates import scale_learning_rates


class Lit(pl.LightningModule):
    def __init__(self, name: str = "adamw") -> None:
        super().__init__()
        self.name = name
        self.net = network()
        self.seen: list[tuple[int, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.name](two_groups(self.net))
        scheduler = schedules.OneCycleLR(optimizer, max_lr=0.05, total_steps=9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append((len(optimizer.param_groups), optimizer.param_groups[0]["lr"]))


class Attach(pl.Callback):
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scales = {f"net.{name}": scale for name, scale in SCALES.items()}
        for optimizer in trainer.optimizers:
            scale_learning_rates(optimizer, Plan(pl_module, scales))


def batches() -> torch.utils.data.DataLoader[Any]:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2)


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=[Attach(), *callbacks], log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_lightning_run(tmp_path: Path) -> None:
    lit, expected = Lit(), network()
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, LearningRateMonitor("step"), max_epochs=2, gradient_clip_val=0.05, logger=logger)
    run.fit(lit, batches())

    by_hand = ByHand(expected, OPTIMIZERS["adamw"], SCALES)
    schedule = schedules.OneCycleLR(by_hand.users, max_lr=0.05, total_steps=9)
    rates = []
    for _ in range(2):
        for (x,) in batches():
            expected.zero_grad()
            (expected(x) - 1).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
            rates.append(by_hand.users.param_groups[0]["lr"])
            by_hand.step()
            schedule.step()
    assert_same(lit.net, expected)
    assert lit.seen == [(2, rate) for rate in rates]
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = [float(row["lr-AdamW/pg1"]) for row in csv.DictReader(file)]
    assert logged == pytest.approx(rates)


@pytest.mark.filterwarnings("ignore")
def test_lightning_resume(tmp_path: Path) -> None:
    straight, first, resumed = Lit(), Lit(), Lit()
    trainer(tmp_path, max_epochs=2, logger=False, enable_checkpointing=False).fit(straight, batches())
    run = trainer(tmp_path, max_epochs=1, logger=False, enable_checkpointing=False)
    run.fit(first, batches())
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = trainer(tmp_path, max_epochs=2, logger=False, enable_checkpointing=False)
    again.fit(resumed, batches(), ckpt_path=tmp_path / "last.ckpt")
    assert_same(straight, resumed)
    (saved,) = torch.load(tmp_path / "last.ckpt")["optimizer_states"]
    assert [len(group["params"]) for group in saved["param_groups"]] == [3, 1]


class Finetuned(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[0], self.net[2]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_backbone_finetuning(tmp_path: Path) -> None:
    lit, expected = Finetuned(), network()
    unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.05, lambda_func=lambda _: 1.0)
    trainer(tmp_path, unfreeze, max_epochs=2, logger=False, enable_checkpointing=False).fit(lit, batches())
    for epoch in range(2):
        for (x,) in batches():
            expected.zero_grad()
            (expected(x) - 1).square().mean().backward()
            for (name, parameter), scale in zip(expected.named_parameters(), SCALES.values(), strict=True):
                rate = 0.1 if name.startswith("2") else 0.05 * epoch
                parameter.data -= rate * scale.lr * parameter.grad
    torch.testing.assert_close(weights(lit.net), weights(expected))
