"""Sequences of symbols: crops of CPython's documentation in bytes, and chains that a small model learns soon."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lightning_unitscale.cookbook.data.documents import python_topics

HELD_OUT = 256  # crops
MASK, BYTES = 256, 257


@cache
def text_crops(length: int, count: int = 4096) -> Tensor:
    """Crops [count + HELD_OUT, length] at random places; the last HELD_OUT are from documents of their own."""
    documents = list(python_topics().values())
    held_out = max(1, len(documents) // 10)
    generator = torch.Generator().manual_seed(0)
    parts = []
    for some, number in ((documents[held_out:], count), (documents[:held_out], HELD_OUT)):
        text = torch.frombuffer(bytearray(b"\n\n".join(some)), dtype=torch.uint8).long()
        starts = torch.randint(len(text) - length, (number,), generator=generator)
        parts.append(text[starts[:, None] + torch.arange(length)])
    return torch.cat(parts)


@cache
def chains(length: int, symbols: int, count: int = 4096) -> Tensor:
    """Walks [count + HELD_OUT, length]: each symbol has one successor, and one step in ten goes anywhere."""
    generator = torch.Generator().manual_seed(0)
    successor = torch.randperm(symbols, generator=generator)
    walks = [torch.randint(symbols, (count + HELD_OUT,), generator=generator)]
    for _ in range(length - 1):
        anywhere = torch.randint(symbols, walks[0].shape, generator=generator)
        strays = torch.rand(walks[0].shape, generator=generator) < 0.1
        walks.append(torch.where(strays, anywhere, successor[walks[-1]]))
    return torch.stack(walks, dim=1)


def masked(sequences: Tensor, mask: int, share: float) -> tuple[Tensor, Tensor]:
    """Sequences with a share of their symbols replaced by `mask`, and the labels: -100 where nothing is to be said."""
    hidden = torch.rand(sequences.shape, generator=torch.Generator().manual_seed(1)) < share
    hidden[:, 0] = True  # no sequence without a label
    return sequences.masked_fill(hidden, mask), sequences.masked_fill(~hidden, -100)
