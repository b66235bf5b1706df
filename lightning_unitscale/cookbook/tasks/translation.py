"""Saying in one language what a text says in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from lightning_unitscale.cookbook.tasks.kept_texts import KeptTexts
from lightning_unitscale.cookbook.tasks.sequence_to_sequence import SequenceToSequence
from lightning_unitscale.errors import InputError


class SacrebleuScores(KeptTexts):
    """chrF and BLEU of a corpus, both from 0 to 1, by sacrebleu.

    torchmetrics' own smooth BLEU otherwise, and average chrF otherwise.

    Raises:
        InputError: `sacrebleu` is not installed.
    """

    def __init__(self) -> None:
        super().__init__("texts", "references")
        sacrebleu_package()

    def update(self, texts: Sequence[str], references: Sequence[str]) -> None:
        """One reference for each text."""
        self.keep("texts", texts)
        self.keep("references", references)

    def compute(self) -> dict[str, Tensor]:
        """`chrf` and `bleu`."""
        tools, texts, references = sacrebleu_package(), self.kept("texts"), self.kept("references")
        scores = {"chrf": tools.corpus_chrf(texts, [references]), "bleu": tools.corpus_bleu(texts, [references])}
        return {name: torch.tensor(score.score / 100) for name, score in scores.items()}


def sacrebleu_package() -> Any:
    """
    Raises:
        InputError: it is not installed.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise InputError("translation needs sacrebleu: pip install 'lightning-unitscale[translation]'") from error
    return sacrebleu


class Translation(SequenceToSequence):
    """Batches: those of `SequenceToSequence`. The test generates, and compares by chrF and BLEU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.corpus = SacrebleuScores()

    @classmethod
    def check(cls, cfg: DictConfig) -> None:
        """The package for the scores is there."""
        sacrebleu_package()

    def compare(self, texts: Sequence[str], wanted: Sequence[str]) -> None:
        """Of all texts together."""
        self.corpus.update(texts, wanted)

    def compared(self) -> dict[str, Tensor]:
        """chrF and BLEU, both from 0 to 1."""
        values: dict[str, Tensor] = self.corpus.compute()
        return values
