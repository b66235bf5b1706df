"""Predicting the next token."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics.text import Perplexity

from lightning_unitscale.cookbook.data import IGNORED
from lightning_unitscale.cookbook.data.examples import Batch
from lightning_unitscale.cookbook.tasks.fine_tuning import FineTuning


class LanguageModeling(FineTuning):
    """Batches: input_ids and labels, both [batch, sequence], labels one token ahead. Losses are nats per token."""

    heads = ("AutoModelForCausalLM",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.perplexity = Perplexity(ignore_index=IGNORED)

    def loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """The mean over the labels that count."""
        output = self.model(input_ids=batch["input_ids"], use_cache=False)
        logits, labels = output.logits.flatten(0, 1), batch["labels"].flatten()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED), output

    def score(self, batch: Batch, output: Any) -> None:
        """Perplexity."""
        self.perplexity.update(output.logits, batch["labels"])

    def scores(self) -> dict[str, Tensor]:
        """Perplexity per token."""
        return {"perplexity": self.perplexity.compute()}
