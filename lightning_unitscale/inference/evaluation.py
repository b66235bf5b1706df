"""Held-out loss outside a Trainer: the number that validation logs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lightning_unitscale.data import IGNORED


@torch.inference_mode()
def held_out_loss(model: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """Mean cross-entropy in nats per token, and the number of tokens it is the mean of.

    Args:
        model: a causal language model, in eval mode.
        batches: (inputs, targets), both [batch, sequence]; targets of -100 do not count.
    """
    total, count = 0.0, 0
    for inputs, targets in batches:
        logits = model(input_ids=inputs.to(model.device), use_cache=False).logits  # [batch, sequence, vocabulary]
        flat = targets.to(model.device).flatten()
        total += float(F.cross_entropy(logits.float().flatten(0, 1), flat, ignore_index=IGNORED, reduction="sum"))
        count += int((flat != IGNORED).sum())
    return total / max(count, 1), count
