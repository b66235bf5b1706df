"""Saying in one language what a text says in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics.text import CHRFScore, SacreBLEUScore

from lightning_unitscale.cookbook.tasks.sequence_to_sequence import SequenceToSequence


class Translation(SequenceToSequence):
    """Batches: those of `SequenceToSequence`. The test generates, and compares as sacrebleu does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.chrf, self.bleu = CHRFScore(n_word_order=0), SacreBLEUScore()

    def compare(self, texts: Sequence[str], wanted: Sequence[str]) -> None:
        """Of all texts together, as sacrebleu does."""
        references = [[text] for text in wanted]
        self.chrf.update(texts, references)
        self.bleu.update(texts, references)

    def compared(self) -> dict[str, Tensor]:
        """chrF and BLEU, both from 0 to 1."""
        return {"chrf": self.chrf.compute(), "bleu": self.bleu.compute()}
