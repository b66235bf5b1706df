"""Unit scaling beside your own LightningModule, Trainer and callbacks: one more callback in the list.

Run it with `python recipes/examples/own_trainer.py`; it takes a few seconds.
"""

from tempfile import TemporaryDirectory

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_unitscale import UnitScaling


class SumOfSines(LightningModule):
    """A regression; nothing in it knows of unit scaling."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self.layers(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.mse_loss(self.layers(batch[0]), batch[1]), prog_bar=True)

    def configure_optimizers(self) -> Optimizer:
        return AdamW(self.parameters(), lr=3e-3)


class LargestGradient(Callback):
    """Your callbacks see the true gradients of the true loss, and the learning rate that you set."""

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step % 100 == 0:
            largest = max(float(p.grad.abs().max()) for p in module.parameters() if p.grad is not None)
            print(f"step {trainer.global_step}: gradients up to {largest:.3f}, lr {optimizer.param_groups[0]['lr']}")


def batches(seed: int, count: int) -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(64 * count, 8, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x.sin().sum(dim=1, keepdim=True)), batch_size=64)


seed_everything(0)
with TemporaryDirectory() as folder:
    scaling, best = UnitScaling(), ModelCheckpoint(folder, monitor="val/loss")
    callbacks = [LargestGradient(), EarlyStopping("val/loss"), best, scaling]
    trainer = Trainer(max_epochs=6, accelerator="cpu", logger=False, callbacks=callbacks)
    trainer.fit(SumOfSines(), batches(seed=0, count=50), batches(seed=1, count=4))
    trainer.validate(SumOfSines.load_from_checkpoint(best.best_model_path), batches(seed=1, count=4))
if scaling.plan is not None:  # it is there from the first training step on
    print(scaling.plan.summary())
