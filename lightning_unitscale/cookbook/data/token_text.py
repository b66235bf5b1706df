"""Documents as token sequences of any tokenizer, for training, validation and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unitscale.cookbook.data.batches import language_model_batch
from lightning_unitscale.cookbook.data.byte_text import ContinuingLoader, RandomCrops, Windows
from lightning_unitscale.cookbook.data.documents import hold_out
from lightning_unitscale.errors import InputError


class TokenText(pl.LightningDataModule):
    """Training crops, and side-by-side windows for validation and test, as batches of `language_model_batch`.

    Args:
        documents: name -> text.
        tokenizer: of transformers; its bos (else eos, else sep) token begins every document and is no target.
        sequence_length: number of predicted tokens per sample.
        batch_size: samples per batch and device.
        steps: batches that one of Lightning's epochs has.
        held_out: share of the text for validation, and as much for the test, in whole documents.
        seed: chooses the crops.
        workers: data loading processes.

    Raises:
        InputError: a part of the split is too short for one sequence, or the tokenizer has no such token.
    """

    def __init__(
        self,
        documents: Mapping[str, bytes],
        tokenizer: Any,
        *,
        sequence_length: int,
        batch_size: int,
        steps: int,
        held_out: float,
        seed: int,
        workers: int = 0,
    ) -> None:
        super().__init__()
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id)
        boundary = next((token for token in special if token is not None), None)
        if boundary is None:
            raise InputError("the tokenizer has no bos, eos or sep token to begin documents with; give another one")
        rest, test = hold_out(documents, held_out)
        training, validation = hold_out({str(number): text for number, text in enumerate(rest)}, held_out)
        streams = {
            part: _join(texts, tokenizer, boundary)
            for part, texts in (("training", training), ("validation", validation), ("test", test))
        }
        for part, stream in streams.items():
            if len(stream) <= sequence_length:
                raise InputError(
                    f"the {part} text has {len(stream)} tokens, too short for one sequence of {sequence_length + 1}; "
                    "give more text, or a smaller task.sequence_length"
                )
        self.training = RandomCrops(streams["training"], sequence_length, steps * batch_size, seed, boundary)
        self.validation, self.test = (
            Windows(streams[part], sequence_length, boundary) for part in ("validation", "test")
        )
        self.options: dict[str, Any] = {
            "batch_size": batch_size,
            "num_workers": workers,
            "collate_fn": language_model_batch,
        }

    def train_dataloader(self) -> ContinuingLoader:
        """Random crops, in the order that the seed gives."""
        return ContinuingLoader(self.training, **self.options)

    def val_dataloader(self) -> DataLoader[Any]:
        """All validation text once."""
        return DataLoader(self.validation, **self.options)

    def test_dataloader(self) -> DataLoader[Any]:
        """All test text once."""
        return DataLoader(self.test, **self.options)


def _join(documents: Sequence[bytes], tokenizer: Any, boundary: int) -> Tensor:
    texts = [text.decode(errors="replace") for text in documents]
    tokens = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor([token for ids in tokens for token in (boundary, *ids)])
