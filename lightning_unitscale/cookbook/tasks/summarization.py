"""Saying in a line what a text says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig
from torch import Tensor
from torchmetrics.text.rouge import ROUGEScore

from lightning_unitscale.cookbook.tasks.sequence_to_sequence import SequenceToSequence
from lightning_unitscale.errors import InputError


class Summarization(SequenceToSequence):
    """Batches: those of `SequenceToSequence`. The test generates, and compares by the longest common subsequence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rouge = rouge_l()

    @classmethod
    def check(cls, cfg: DictConfig) -> None:
        """The package for the score is there."""
        rouge_l()

    def compare(self, texts: Sequence[str], wanted: Sequence[str]) -> None:
        """Each text with its own."""
        self.rouge.update(list(texts), list(wanted))

    def compared(self) -> dict[str, Tensor]:
        """The mean F1 of ROUGE-L, from 0 to 1."""
        return {"rouge_l": self.rouge.compute()["rougeL_fmeasure"]}


def rouge_l() -> ROUGEScore:
    """The metric of torchmetrics.

    Raises:
        InputError: `nltk`, which it needs, is not installed.
    """
    try:
        return ROUGEScore(rouge_keys="rougeL")
    except ModuleNotFoundError as error:
        raise InputError("summarization needs nltk: pip install 'lightning-unitscale[summarization]'") from error
