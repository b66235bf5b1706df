"""Held-out scores outside a Trainer: the numbers that validation logs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lightning_unitscale.cookbook.data.examples import Batch
    from lightning_unitscale.cookbook.tasks import FineTuning


@torch.inference_mode()
def held_out_scores(module: FineTuning, batches: Iterable[Batch]) -> tuple[dict[str, float], int]:
    """The loss over all targets (nats), with the task's own scores, and the number of targets.

    Args:
        module: the task, around the model.
        batches: of the task; targets of -100 do not count.
    """
    module.eval()
    module.on_validation_epoch_start()
    count = 0
    for index, batch in enumerate(batches):
        batch = {name: tensor.to(module.device) for name, tensor in batch.items()}
        module.validation_step(batch, index)
        count += int((batch["labels"] >= 0).sum())
    scores = {"loss": module.held_out_loss.compute(), **module.scores()}
    return {name: float(value) for name, value in scores.items()}, count
