"""From examples to what a transformers model takes: tokens, padding, labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_unitscale.cookbook.data.byte_text import IGNORED, Sample
from lightning_unitscale.cookbook.data.examples import Batch, Image, Labelled, Pair


def language_model_batch(samples: Sequence[Sample]) -> Batch:
    """input_ids and labels, both [batch, sequence]; labels are one token ahead."""
    inputs, targets = (torch.stack(column) for column in zip(*samples, strict=True))
    return {"input_ids": inputs, "labels": targets}


class TextBatch:
    """input_ids and attention_mask [batch, longest text], labels [batch].

    Args:
        tokenizer: of transformers.
        labels: class -> number.
        max_length: tokens; longer texts are cut.
    """

    def __init__(self, tokenizer: Any, labels: Mapping[str, int], max_length: int) -> None:
        self.tokenizer, self.labels, self.max_length = tokenizer, labels, max_length

    def __call__(self, examples: Sequence[Labelled]) -> Batch:
        """One batch."""
        tokens = self.tokenizer(
            [example.text for example in examples],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        labels = torch.tensor([self.labels[example.label] for example in examples])
        return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "labels": labels}


class PairBatch:
    """input_ids and attention_mask [batch, longest source], labels [batch, longest target] that end in eos.

    Args:
        tokenizer: of transformers, with an eos token.
        max_length: tokens of source and target each; longer ones are cut.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, pairs: Sequence[Pair]) -> Batch:
        """One batch."""
        tokens = self.tokenizer(
            [pair.source for pair in pairs],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        labels = [self._target(pair.target) for pair in pairs]
        return {
            "input_ids": tokens.input_ids,
            "attention_mask": tokens.attention_mask,
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    def _target(self, text: str) -> Tensor:
        """Tokens and eos; the model itself puts its first decoder token in front."""
        ids, eos = self.tokenizer(text_target=text).input_ids, self.tokenizer.eos_token_id
        ids = ids[1:] if ids[:1] == [eos] else ids
        ids = ids[:-1] if ids[-1:] == [eos] else ids
        return torch.tensor([*ids[: self.max_length - 1], eos])


class ImageBatch:
    """pixel_values [batch, channels, height, width], labels [batch].

    Args:
        labels: class -> number.
        channels: grey images are repeated for more than one.
        size: height and width to resize to, in pixels.
    """

    def __init__(self, labels: Mapping[str, int], channels: int, size: tuple[int, int]) -> None:
        self.labels, self.channels, self.size = labels, channels, size

    def __call__(self, images: Sequence[Image]) -> Batch:
        """One batch."""
        pixels = torch.stack([image.pixels for image in images])
        if pixels.shape[-2:] != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", align_corners=False)
        labels = torch.tensor([self.labels[image.label] for image in images])
        return {"pixel_values": pixels.expand(-1, self.channels, -1, -1), "labels": labels}
