"""Documents as byte sequences of one length, in an order that a resumed run continues exactly.

Tokens are bytes, 0 to 255, and BOS in front of each document. Documents are laid end to end:

    training     sample i starts at a position hashed from (seed, i): no shuffling state, nothing to restore
    held out     windows side by side, so that every byte is predicted exactly once
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_unitscale.cookbook.data.documents import hold_out
from lightning_unitscale.errors import InputError

BOS = 256  # begins every document
VOCABULARY = 257
IGNORED = -100  # a target that counts in no loss: BOS and padding

Sample = tuple[Tensor, Tensor]  # input and target, both [sequence_length], target one byte ahead


def encode(text: bytes) -> Tensor:
    """BOS and the bytes, as int64."""
    return torch.tensor([BOS, *text])


def decode(tokens: Tensor) -> str:
    """The text of the tokens; broken UTF-8 is shown as the replacement character."""
    return bytes(token for token in tokens.tolist() if token < BOS).decode(errors="replace")


def _sample(tokens: Tensor, boundary: int) -> Sample:
    inputs, targets = tokens[:-1], tokens[1:]
    return inputs, targets.masked_fill(targets == boundary, IGNORED)


class RandomCrops(Dataset[Sample]):
    """`length` crops of the training text; `start` is the number of samples used before this epoch.

    The token `boundary` stands between documents, and is no target.
    """

    def __init__(self, tokens: Tensor, sequence_length: int, length: int, seed: int, boundary: int = BOS) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.length = length
        self.seed = seed
        self.boundary = boundary
        self.start = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        digest = hashlib.blake2b(f"{self.seed}/{self.start + index}".encode(), digest_size=8).digest()
        position = int.from_bytes(digest, "little") % (len(self.tokens) - self.sequence_length)
        return _sample(self.tokens[position : position + self.sequence_length + 1], self.boundary)


class Windows(Dataset[Sample]):
    """The held-out text from end to end; only the last window has padding."""

    def __init__(self, tokens: Tensor, sequence_length: int, boundary: int = BOS) -> None:
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


class ContinuingLoader(DataLoader[Any]):
    """Counts the batches it hands out; Lightning keeps the count in the checkpoint and gives it back.

    Its data set has an attribute `start`, the number of samples used before.
    """

    batches = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # Lightning needs an iterator, not torch's own class
        assert self.batch_size is not None
        dataset: Any = self.dataset
        dataset.start = self.batches * self.batch_size * getattr(self.sampler, "num_replicas", 1)
        for batch in super().__iter__():
            self.batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches handed out since training began."""
        return {"batches": self.batches}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues after that many batches."""
        self.batches = state["batches"]


class ByteText(pl.LightningDataModule):
    """Training crops and held-out windows of the given documents, as (input, target) batches.

    Args:
        documents: Name -> text.
        sequence_length: Number of predicted bytes per sample.
        batch_size: Samples per batch and device.
        steps: Batches per epoch. Crops never run out, so this only says what an epoch is.
        held_out: Share of the text kept for validation, whole documents at a time.
        seed: Chooses the crops.
        workers: Data loading processes.

    Raises:
        InputError: a part of the split is too short for one sequence.
    """

    def __init__(
        self,
        documents: Mapping[str, bytes],
        *,
        sequence_length: int,
        batch_size: int,
        steps: int,
        held_out: float,
        seed: int,
        workers: int = 0,
    ) -> None:
        super().__init__()
        training, validation = hold_out(documents, held_out)
        tokens = {"training": _join(training), "held-out": _join(validation)}
        for part, stream in tokens.items():
            if len(stream) <= sequence_length:
                raise InputError(
                    f"the {part} text has {len(stream)} bytes, too short for one sequence of "
                    f"{sequence_length + 1}; give more text, or a smaller task.sequence_length"
                )
        self.training = RandomCrops(tokens["training"], sequence_length, steps * batch_size, seed)
        self.held_out = Windows(tokens["held-out"], sequence_length)
        self.batch_size = batch_size
        self.workers = workers

    def train_dataloader(self) -> ContinuingLoader:
        """Random crops, in the order that the seed gives."""
        return ContinuingLoader(self.training, batch_size=self.batch_size, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader[Sample]:
        """All held-out text once."""
        return DataLoader(self.held_out, batch_size=self.batch_size, num_workers=self.workers)


def _join(documents: Sequence[bytes]) -> Tensor:
    return torch.cat([encode(text) for text in documents])
