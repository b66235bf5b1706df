"""Turning one text into another, with an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.text import CharErrorRate

from lightning_unitscale.cookbook.data.continuing_loader import loading
from lightning_unitscale.cookbook.data.examples import IGNORED, Batch, Examples, Pair, split_by
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.tasks.text_generation import TextGeneration
from lightning_unitscale.cookbook.tokenizers import make_able_to_pad
from lightning_unitscale.errors import InputError

SHOWN = 8  # pairs


class PairBatch:
    """input_ids and attention_mask [batch, longest source], labels [batch, longest target] that end in eos.

    Args:
        tokenizer: of transformers, with an eos token.
        max_length: tokens of source and target each; longer ones are cut.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, pairs: Sequence[Pair]) -> Batch:
        """One batch."""
        tokens = self.tokenizer(
            [pair.source for pair in pairs],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        labels = [self._target(pair.target) for pair in pairs]
        return {
            "input_ids": tokens.input_ids,
            "attention_mask": tokens.attention_mask,
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    def _target(self, text: str) -> Tensor:
        """Tokens and eos; the model itself puts its first decoder token in front."""
        ids, eos = self.tokenizer(text_target=text).input_ids, self.tokenizer.eos_token_id
        ids = ids[1:] if ids[:1] == [eos] else ids
        ids = ids[:-1] if ids[-1:] == [eos] else ids
        return torch.tensor([*ids[: self.max_length - 1], eos])


class SequenceToSequence(TextGeneration):
    """Batches: input_ids and attention_mask [batch, source], labels [batch, target] that end in eos.

    Validation looks at the loss; the test also generates, greedily, and compares the texts.
    """

    heads = ("AutoModelForSeq2SeqLM",)
    predicts_held_out = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.character_errors = CharErrorRate()
        self.exact = MeanMetric()

    @classmethod
    def data_module(cls, examples: Sequence[Pair], found: Pretrained, cfg: DictConfig) -> Examples:
        """Batches of pairs; those of one group, and equal sources, stay on one side of the split."""
        tokenizer = found.text_tokenizer()
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no eos token, so a generated text would never end; give another one")
        make_able_to_pad(tokenizer, found.model)
        parts = split_by(lambda pair: pair.group or pair.source, examples, cfg.data.held_out)
        return Examples(parts, PairBatch(tokenizer, cfg.task.sequence_length), **loading(cfg))

    def test_score(self, batch: Batch) -> None:
        """Generated texts against the targets."""
        self.compare(self._generated(batch), self._wanted(batch))

    def test_scores(self) -> dict[str, Tensor]:
        """Those of generated texts."""
        return self.compared()

    def compare(self, texts: Sequence[str], wanted: Sequence[str]) -> None:
        """Update the metrics of generated texts."""
        self.character_errors.update(list(texts), list(wanted))
        self.exact.update(torch.tensor([float(a == b) for a, b in zip(texts, wanted, strict=True)]))

    def compared(self) -> dict[str, Tensor]:
        """The share of characters to be changed, and of texts that are right."""
        return {"character_error_rate": self.character_errors.compute(), "exact_match": self.exact.compute()}

    def predict_step(self, batch: Batch | list[str], batch_idx: int) -> dict[str, list[str]]:
        """One text for each; those of the task's own data stand beside their sources and what was wanted."""
        if isinstance(batch, list):
            return super().predict_step(batch, batch_idx)
        sources = self.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        return {"source": sources, "text": self._generated(batch), "target": self._wanted(batch)}

    def show(self, batches: DataLoader[Any], folder: Path, settings: Mapping[str, Any]) -> list[str | Path]:
        """Some sources, what was wanted, and what the model wrote."""
        batch = {name: tensor[:SHOWN].to(self.device) for name, tensor in next(iter(batches)).items()}
        columns = self.predict_step(batch, 0)
        rows = zip(columns["source"], columns["target"], columns["text"], strict=True)
        return ["\n\n".join(f"source     {a}\nreference  {b}\noutput     {c}" for a, b, c in rows)]

    def _generated(self, batch: Batch) -> list[str]:
        """Greedily, up to the longest of the targets."""
        generated = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=batch["labels"].shape[1],
            do_sample=False,
        )
        texts: list[str] = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return texts

    def _wanted(self, batch: Batch) -> list[str]:
        targets = batch["labels"].masked_fill(batch["labels"] == IGNORED, self.tokenizer.pad_token_id)
        texts: list[str] = self.tokenizer.batch_decode(targets, skip_special_tokens=True)
        return texts
