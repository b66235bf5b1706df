"""What the world outside sees of a run in a Trainer."""

from typing import Any

import pytorch_lightning as pl

from support.zoo_batches import Batch


class Seen(pl.Callback):
    """What the world outside sees of a run: losses, logged values, learning rates, gradients, order of the batches."""

    def __init__(self) -> None:
        self.losses: list[Any] = []
        self.logged: list[Any] = []
        self.rates: list[Any] = []
        self.gradients: list[Any] = []
        self.batches: list[int] = []

    def differences(self, other: "Seen") -> list[str]:
        """What differs; comparing the lists in an assert would print them for minutes."""
        names = ("losses", "logged", "rates", "gradients", "batches")
        return [name for name in names if repr(getattr(self, name)) != repr(getattr(other, name))]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.batches.append(int(next(iter(batch.values())).sum()))
        self.losses.append(float(outputs["loss"]) if outputs else None)
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.gradients.append([p.grad.double().norm().item() for p in pl_module.parameters() if p.grad is not None])
