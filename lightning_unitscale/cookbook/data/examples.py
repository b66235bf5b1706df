"""Data sets made of examples: how they are split, and in which order they come.

split        in the order of a hash of what must not be on both sides: the same on every machine, in every run
training     epoch after epoch without an end, each in an order hashed from (seed, epoch); resumes exactly
held out     every example once
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_unitscale.cookbook.data.continuing_loader import ContinuingLoader, in_turns, processes
from lightning_unitscale.errors import InputError

Example = TypeVar("Example")
Batch = dict[str, Tensor]  # arguments of a transformers model, "labels" among them
IGNORED = -100  # a label that counts in no loss: the beginning of a document, and padding


@dataclass(frozen=True)
class Labelled:
    """A text and its class; texts of one group stay on one side of a split."""

    text: str
    label: str
    group: str


@dataclass(frozen=True)
class Pair:
    """A text and what it is to be turned into; pairs of one group stay on one side of a split, as equal sources do."""

    source: str
    target: str
    group: str = ""


@dataclass(frozen=True)
class Image:
    """An image and its class; images of one group stay on one side of a split.

    Attributes:
        pixels: [channels, height, width] with values in -1 … 1, or a file.
    """

    pixels: Tensor | Path
    label: str
    group: str


def split_by(
    key: Callable[[Example], str],
    examples: Sequence[Example],
    share: float,
    label: Callable[[Example], str] = lambda example: "",
) -> list[list[Example]]:
    """Training, validation and test examples.

    Args:
        key: examples with equal keys stay together.
        examples: of any kind.
        share: of the examples for validation, and as many for the test, as closely as whole groups allow.
        label: what the three parts hold in the same proportions. Large groups go to training, and so does all of a
            class that has too few groups.

    Raises:
        InputError: the share is not between 0 and ½, or a part stays empty.
    """
    if not 0 < share < 0.5:
        raise InputError(f"data.held_out={share} must lie between 0 and 0.5 (validation and test have so much each)")
    groups: dict[str, Counter[str]] = {}
    for example in examples:
        groups.setdefault(key(example), Counter())[label(example)] += 1
    totals = sum(groups.values(), Counter[str]())
    missing = [dict.fromkeys(totals, part) for part in (1 - 2 * share, share, share)]  # of each class's examples
    part_of: dict[str, int] = {}
    for group in sorted(groups, key=lambda name: (-groups[name].total(), hashlib.blake2b(name.encode()).digest())):
        shares = {name: count / totals[name] for name, count in groups[group].items()}
        gains = [sum(of_class * part[name] for name, of_class in shares.items()) for part in missing]  # least squares
        part_of[group] = gains.index(max(gains))
        for name, of_class in shares.items():
            missing[part_of[group]][name] -= of_class

    parts = [[example for example in examples if part_of[key(example)] == part] for part in range(3)]
    for name, part in zip(("training", "validation", "test"), parts, strict=True):
        if not part:
            raise InputError(f"no example is left for {name} of {len(examples)}; give more, or change data.held_out")
    return parts


class Endless(Dataset[Example], Generic[Example]):
    """`length` training examples; `start` is the number of those used before this epoch of Lightning's."""

    def __init__(self, examples: Sequence[Example], length: int, seed: int) -> None:
        self.examples, self.length, self.seed = examples, length, seed
        self.start = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.length * processes()

    def __getitem__(self, index: int) -> Example:
        epoch, position = divmod(self.start + index, len(self.examples))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(hash((self.seed, epoch)))  # of ints: the same everywhere
            self._order = (epoch, torch.randperm(len(self.examples), generator=generator).tolist())
        return self.examples[self._order[1][position]]


class Examples(pl.LightningDataModule):
    """Batches of examples for training, validation and test.

    Args:
        parts: training, validation and test examples.
        collate: makes a batch of examples.
        batch_size: examples per batch and device.
        steps: batches that one of Lightning's epochs has.
        seed: chooses the order.
        workers: data loading processes.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Any]],
        collate: Callable[[list[Any]], Batch],
        *,
        batch_size: int,
        steps: int,
        seed: int,
        workers: int = 0,
    ) -> None:
        super().__init__()
        training, self.validation, self.test = parts
        self.training: Endless[Any] = Endless(training, steps * batch_size, seed)
        self.options: dict[str, Any] = {"batch_size": batch_size, "num_workers": workers, "collate_fn": collate}

    def sizes(self) -> dict[str, int]:
        """How many examples each part has."""
        parts = {"training": self.training.examples, "validation": self.validation, "test": self.test}
        return {f"{part} examples": len(examples) for part, examples in parts.items()}

    def train_dataloader(self) -> ContinuingLoader:
        """In the order that the seed gives."""
        return ContinuingLoader(self.training, sampler=in_turns(self.training, self.trainer), **self.options)

    def val_dataloader(self) -> DataLoader[Any]:
        """Every validation example once."""
        return loader_of(self.validation, **self.options)

    def test_dataloader(self) -> DataLoader[Any]:
        """Every test example once."""
        return loader_of(self.test, **self.options)


def loader_of(examples: Sequence[Any], **options: Any) -> DataLoader[Any]:
    """Every example once, in order; a list is a data set to torch, if not to its types."""
    return DataLoader(cast("Dataset[Any]", examples), **options)
