"""What counting alone predicts of a text: a floor that a trained model has to be below."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_unitscale.cookbook.data.token_text import TokenText

LARGEST_COUNTED = 4096  # tokens, whose pairs are counted in a table of 4096² numbers


def bigram_loss(training: Tensor, held_out: Tensor, vocabulary: int) -> float:
    """Held-out loss of counted pairs of tokens, in nats per token.

    P(b | a) = (n_ab + P(b)) / (n_a + 1) with P(b) = (n_b + 1) / (n + V): pairs that were seen by their share, others by
    how frequent the token is (interpolation with the unigrams, of weight 1 / (n_a + 1)).

    Args:
        training, held_out: tokens in their order, [length].
        vocabulary: V.
    """
    unigrams = torch.bincount(training, minlength=vocabulary).double()
    single = (unigrams + 1) / (unigrams.sum() + vocabulary)
    pairs = torch.bincount(training[:-1] * vocabulary + training[1:], minlength=vocabulary**2).double()
    pairs = pairs.view(vocabulary, vocabulary)
    conditional = (pairs + single) / (pairs.sum(1, keepdim=True) + 1)
    return float(-conditional[held_out[:-1], held_out[1:]].log().mean())


def counted_loss(data: pl.LightningDataModule) -> dict[str, float]:
    """What counting alone predicts of a text, which a model has to be below; nothing of other data or many tokens."""
    if not isinstance(data, TokenText):
        return {}
    training, held_out = data.training.tokens, data.validation.tokens
    vocabulary = 1 + int(max(training.max(), held_out.max()))
    if vocabulary > LARGEST_COUNTED:
        return {}
    return {"val/loss, of counted pairs of tokens": bigram_loss(training, held_out, vocabulary)}
