"""Metrics of a whole corpus of texts: they keep all of them until they are computed, over all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

_END = b"\0"  # of a text, in the bytes that are kept


class KeptTexts(Metric):
    """Texts by name, each in the order in which they came; a subclass computes something of them.

    Args:
        names: of the kinds of texts.
    """

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_state(name, [], dist_reduce_fx="cat")

    def keep(self, name: str, texts: Sequence[str]) -> None:
        """More of one kind."""
        state: list[Tensor] = getattr(self, name)
        for text in texts:
            content = [*text.replace("\0", "").encode(errors="replace"), *_END]
            state.append(torch.tensor(content, dtype=torch.uint8, device=self.device))

    def kept(self, name: str) -> list[str]:
        """All of one kind."""
        state: Any = getattr(self, name)
        content = torch.cat(state) if isinstance(state, list) and state else state
        return [text.decode() for text in bytes(content.tolist() if len(content) else ()).split(_END)[:-1]]
