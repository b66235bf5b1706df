"""The `NonFiniteSteps` callback: a NaN that gets into weights or an average of gradients never leaves them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_unitscale.engine.record.spread_tensors import part_of
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.namespaces import Callback
from lightning_unitscale.options import choose
from lightning_unitscale.warn_user import warn_user

if TYPE_CHECKING:
    import pytorch_lightning as pl

ACTIONS = ("stop", "skip")


class NonFiniteSteps(Callback):
    """Names the step and the batch at which a loss or a gradient is NaN or infinite: `NonFiniteSteps("skip")`.

    Looked at after the backward pass and before the optimizer, so that weights and the optimizer's state are what they
    were. All processes do the same. It waits for the device once a batch and once a step. Where a GradScaler looks for
    infinite gradients, losses alone are looked at.

    Args:
        action: "stop" raises; "skip" leaves the step out, with a warning, puts buffers (BatchNorm's averages) back to
            what they were before it, and counts.

    Attributes:
        skipped: how many steps were left out, over resumed runs too.

    Raises:
        UnitScalingError: the action is another one (at once); a step is not finite (under "stop").
    """

    def __init__(self, action: str = "stop") -> None:
        choose("action", action, ACTIONS)
        self.action = action
        self.skipped = 0
        self._batch = 0
        self._bad_batches: list[int] = []
        self._buffers: dict[str, Tensor] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember which batch it is, and buffers as they are before a step's first one."""
        self._batch = batch_idx
        if self.action == "skip" and not self._buffers:
            self._buffers = {
                name: buffer.clone() for name, buffer in pl_module.named_buffers() if buffer.is_floating_point()
            }

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Note a loss that is not finite."""
        if not math.isfinite(loss.detach()):
            self._bad_batches.append(self._batch)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Stop, or drop the gradients, so that the optimizer changes nothing."""
        batches, self._bad_batches = self._bad_batches, []
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        bad = bool(batches) or (scaler is None and not _all_finite([p.grad for p in parameters]))
        buffers, self._buffers = self._buffers, {}
        if not trainer.strategy.reduce_boolean_decision(bad, all=False):
            return
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        found = [names.get(p, "?") for p in parameters if not _all_finite([p.grad])]
        where = f"step {trainer.global_step} (epoch {trainer.current_epoch}, batch {batches or [self._batch]})"
        what = "the loss is NaN or infinite" if batches else f"gradients are NaN or infinite: {', '.join(found[:3])}"
        what = what if bad else "a loss or gradient of another process is NaN or infinite"
        if self.action == "stop":
            raise UnitScalingError(
                f"{where}: {what}. Weights and the optimizer's state are those before this step. Look at that batch, "
                "lower the learning rate, or leave such steps out with NonFiniteSteps('skip')."
            )
        self.skipped += 1
        warn_user(f"{where} is left out: {what}; {self.skipped} left out so far.")
        for parameter in parameters:
            parameter.grad = None
        for name, buffer in pl_module.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])

    def state_dict(self) -> dict[str, Any]:
        """The count goes on in a resumed run."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped = state_dict["skipped"]


def _all_finite(gradients: list[Tensor | None]) -> bool:
    parts = [part_of(gradient) for gradient in gradients if gradient is not None]
    return not parts or bool(torch.stack([part.isfinite().all() for part in parts]).all())
