"""Documents as token sequences of one length, in an order that a resumed run continues exactly.

A token that is no target (BOS where there is one) stands in front of each document, and documents are laid end to end:

    training     sample i starts at a position hashed from (seed, i): no shuffling state, nothing to restore
    held out     windows side by side, so that every token is predicted exactly once
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from lightning_unitscale.cookbook.data.continuing_loader import ContinuingLoader, in_turns, processes
from lightning_unitscale.cookbook.data.documents import hold_out
from lightning_unitscale.cookbook.data.examples import IGNORED, Batch
from lightning_unitscale.cookbook.tokenizers import is_of_bytes
from lightning_unitscale.errors import InputError

Sample = tuple[Tensor, Tensor]  # input and target, both [sequence_length], target one token ahead


class RandomCrops(Dataset[Sample]):
    """`length` crops of the training text; `start` is the number of samples used before this epoch.

    The token `boundary` stands between documents, and is no target.
    """

    def __init__(self, tokens: Tensor, sequence_length: int, length: int, seed: int, boundary: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.length = length
        self.seed = seed
        self.boundary = boundary
        self.start = 0

    def __len__(self) -> int:
        return self.length * processes()

    def __getitem__(self, index: int) -> Sample:
        digest = hashlib.blake2b(f"{self.seed}/{self.start + index}".encode(), digest_size=8).digest()
        position = int.from_bytes(digest, "little") % (len(self.tokens) - self.sequence_length)
        return _sample(self.tokens[position : position + self.sequence_length + 1], self.boundary)


class Windows(Dataset[Sample]):
    """The held-out text from end to end; only the last window has padding."""

    def __init__(self, tokens: Tensor, sequence_length: int, boundary: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.boundary = boundary

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.sequence_length)

    def __getitem__(self, index: int) -> Sample:
        position = index * self.sequence_length
        window = self.tokens[position : position + self.sequence_length + 1]
        padding = torch.full((self.sequence_length + 1 - len(window),), self.boundary)
        return _sample(torch.cat([window, padding]), self.boundary)


def _sample(tokens: Tensor, boundary: int) -> Sample:
    inputs, targets = tokens[:-1], tokens[1:]
    return inputs, targets.masked_fill(targets == boundary, IGNORED)


class TokenText(pl.LightningDataModule):
    """Training crops, and side-by-side windows for validation and test.

    Batches: input_ids and labels, both [batch, sequence]; labels are one token ahead.

    Args:
        documents: name -> text.
        tokenizer: its bos (else eos, else sep) token begins every document and is no target.
        sequence_length: number of predicted tokens per sample.
        batch_size: samples per batch and device.
        steps: batches that one of Lightning's epochs has. Crops never run out, so this only says what an epoch is.
        held_out: share of the text for validation, in whole documents.
        seed: chooses the crops.
        workers: data loading processes.
        test_part: as much text as for validation is kept apart for the test; False: both are on the same text.

    Attributes:
        boundary: the token that begins every document.
        training, validation, test: data sets of samples; their `tokens` are the whole text.

    Raises:
        InputError: a part of the split is too short for one sequence, or the tokenizer has no such token.
    """

    def __init__(
        self,
        documents: Mapping[str, bytes],
        tokenizer: PreTrainedTokenizerBase,
        *,
        sequence_length: int,
        batch_size: int,
        steps: int,
        held_out: float,
        seed: int,
        workers: int = 0,
        test_part: bool = True,
    ) -> None:
        super().__init__()
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id)
        boundary = next((token for token in special if isinstance(token, int)), None)
        if boundary is None:
            raise InputError("the tokenizer has no bos, eos or sep token to begin documents with; give another one")
        texts = _split(documents, held_out, test_part)
        tokens = {part: _join(some, tokenizer, boundary) for part, some in texts.items()}
        for part, stream in tokens.items():
            if len(stream) <= sequence_length:
                raise InputError(
                    f"the {part} text has {len(stream)} tokens, too short for one sequence of {sequence_length + 1}; "
                    "give more text, or a smaller task.sequence_length"
                )
        self.boundary = boundary
        self.training = RandomCrops(tokens["training"], sequence_length, steps * batch_size, seed, boundary)
        self.validation = Windows(tokens["validation"], sequence_length, boundary)
        self.test = Windows(tokens["test"], sequence_length, boundary) if test_part else self.validation
        self.options: dict[str, Any] = {"batch_size": batch_size, "num_workers": workers, "collate_fn": _batch}

    def sizes(self) -> dict[str, int]:
        """How many tokens each part has, without those that begin documents."""
        parts = {"training": self.training.tokens, "validation": self.validation.tokens, "test": self.test.tokens}
        if self.test is self.validation:
            parts = {"training": self.training.tokens, "validation (also test)": self.validation.tokens}
        return {f"tokens in the {part} data": int((tokens != self.boundary).sum()) for part, tokens in parts.items()}

    def seen(self, batches: int) -> dict[str, int]:
        """How many tokens so many batches of the training predict, on all processes; crops may overlap."""
        tokens = batches * self.options["batch_size"] * self.training.sequence_length * processes()
        return {"tokens seen in training": tokens}

    def train_dataloader(self) -> ContinuingLoader:
        """Random crops, in the order that the seed gives."""
        return ContinuingLoader(self.training, sampler=in_turns(self.training, self.trainer), **self.options)

    def val_dataloader(self) -> DataLoader[Any]:
        """All validation text once."""
        return DataLoader(self.validation, **self.options)

    def test_dataloader(self) -> DataLoader[Any]:
        """All test text once."""
        return DataLoader(self.test, **self.options)


def _split(documents: Mapping[str, bytes], share: float, test_part: bool) -> dict[str, list[bytes]]:
    test: dict[str, list[bytes]] = {}
    if test_part:
        rest, test["test"] = hold_out(documents, share)
        documents = {str(number): text for number, text in enumerate(rest)}
    training, validation = hold_out(documents, share)
    return {"training": training, "validation": validation, **test}


def _join(documents: Sequence[bytes], tokenizer: PreTrainedTokenizerBase, boundary: int) -> Tensor:
    tokens: Sequence[Sequence[int]]
    if is_of_bytes(tokenizer):
        tokens = documents  # every byte is its own token, also where the text is no UTF-8
    else:
        texts = [text.decode(errors="replace") for text in documents]
        tokens = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in tokens for token in (boundary, *ids)])


def _batch(samples: Sequence[Sample]) -> Batch:
    inputs, targets = (torch.stack(column) for column in zip(*samples, strict=True))
    return {"input_ids": inputs, "labels": targets}
