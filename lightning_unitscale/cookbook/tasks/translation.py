"""Saying in one language what a text says in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchmetrics import Metric

from lightning_unitscale.cookbook.tasks.sequence_to_sequence import SequenceToSequence
from lightning_unitscale.errors import InputError

_END = b"\0"  # of a text, in the bytes that are kept


class SacrebleuScores(Metric):
    """chrF and BLEU of a corpus, both from 0 to 1, by sacrebleu.

    torchmetrics' own smooth BLEU otherwise, and average chrF otherwise.

    Raises:
        InputError: `sacrebleu` is not installed.
    """

    texts: list[Tensor]
    references: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        sacrebleu_package()
        self.add_state("texts", [], dist_reduce_fx="cat")
        self.add_state("references", [], dist_reduce_fx="cat")

    def update(self, texts: Sequence[str], references: Sequence[str]) -> None:
        """One reference for each text."""
        for text, reference in zip(texts, references, strict=True):
            self.texts.append(_bytes(text, self.device))
            self.references.append(_bytes(reference, self.device))

    def compute(self) -> dict[str, Tensor]:
        """`chrf` and `bleu`."""
        tools, texts, references = sacrebleu_package(), _texts(self.texts), _texts(self.references)
        scores = {"chrf": tools.corpus_chrf(texts, [references]), "bleu": tools.corpus_bleu(texts, [references])}
        return {name: torch.tensor(score.score / 100) for name, score in scores.items()}


def _bytes(text: str, device: torch.device) -> Tensor:
    return torch.tensor([*text.replace("\0", "").encode(), *_END], dtype=torch.uint8, device=device)


def _texts(state: list[Tensor] | Tensor) -> list[str]:
    kept = torch.cat(state) if isinstance(state, list) else state
    return [text.decode() for text in bytes(kept.tolist()).split(_END)[:-1]]


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
