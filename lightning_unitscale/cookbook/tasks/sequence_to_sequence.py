"""Turning one text into another, with an encoder and a decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.text import CharErrorRate

from lightning_unitscale.cookbook.data import IGNORED
from lightning_unitscale.cookbook.data.examples import Batch
from lightning_unitscale.cookbook.tasks.fine_tuning import FineTuning


class SequenceToSequence(FineTuning):
    """Batches: input_ids and attention_mask [batch, source], labels [batch, target] that end in eos.

    Validation looks at the loss; the test also generates, greedily, and compares the texts.
    """

    heads = ("AutoModelForSeq2SeqLM",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.character_errors = CharErrorRate()
        self.exact = MeanMetric()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss, and generated texts against the targets."""
        super().test_step(batch, batch_idx)
        labels = batch["labels"]
        generated = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=labels.shape[1],
            do_sample=False,
        )
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        targets = labels.masked_fill(labels == IGNORED, self.tokenizer.pad_token_id)
        wanted = self.tokenizer.batch_decode(targets, skip_special_tokens=True)
        self.character_errors.update(texts, wanted)
        self.exact.update(torch.tensor([float(a == b) for a, b in zip(texts, wanted, strict=True)]))

    def on_test_epoch_end(self) -> None:
        """The share of characters to be changed, and of texts that are right."""
        super().on_test_epoch_end()
        values: dict[str, Tensor] = {
            "test/character_error_rate": self.character_errors.compute(),
            "test/exact_match": self.exact.compute(),
        }
        self.log_dict(values, sync_dist=True)
