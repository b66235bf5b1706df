"""Choosing one of several classes for a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig

from lightning_unitscale.cookbook.data.examples import Batch, Labelled
from lightning_unitscale.cookbook.pretrained import Pretrained, context_length
from lightning_unitscale.cookbook.tasks.classification import Classification, Collate
from lightning_unitscale.cookbook.tokenizers import make_able_to_pad


class TextBatch:
    """input_ids and attention_mask [batch, longest text], labels [batch].

    Args:
        tokenizer: of transformers.
        labels: class -> number.
        max_length: tokens; longer texts are cut.
    """

    def __init__(self, tokenizer: Any, labels: Mapping[str, int], max_length: int) -> None:
        self.tokenizer, self.labels, self.max_length = tokenizer, labels, max_length

    def __call__(self, examples: Sequence[Labelled]) -> Batch:
        """One batch."""
        tokens = self.tokenizer(
            [example.text for example in examples],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        labels = torch.tensor([self.labels[example.label] for example in examples])
        return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "labels": labels}


class TextClassification(Classification):
    """Batches: input_ids and attention_mask [batch, longest text], labels [batch]."""

    heads = ("AutoModelForSequenceClassification",)

    @classmethod
    def collate(cls, numbers: dict[str, int], found: Pretrained, cfg: DictConfig) -> Collate:
        """Tokens, cut to `task.sequence_length`."""
        tokenizer = found.text_tokenizer()
        make_able_to_pad(tokenizer, found.model)
        return TextBatch(tokenizer, numbers, cfg.task.sequence_length)

    def collate_texts(self, texts: Sequence[str], generation: Mapping[str, Any]) -> Callable[[list[str]], Batch]:
        """Tokens, cut to the model's context."""
        context = context_length(self.model)
        options = {"padding": True, "truncation": context is not None, "max_length": context, "return_tensors": "pt"}
        return lambda batch: dict(self.tokenizer(batch, **options))
