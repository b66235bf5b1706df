"""Reading speech by connectionist temporal classification: a letter or none for every moment of sound."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_unitscale.cookbook.data.examples import IGNORED, Batch
from lightning_unitscale.cookbook.data.sound import HOP, RATE, log_mel, normalised, seconds_of
from lightning_unitscale.cookbook.data.speech import Utterance, sound_of
from lightning_unitscale.errors import InputError


class UtteranceBatch:
    """The model's input and attention_mask, both [batch, longest …], and labels [batch, longest text].

    The input is input_values, samples with mean 0 and RMS 1, or input_features, log-mel frames of which each row holds
    as many side by side as the model takes.

    Args:
        tokenizer: of the texts.
        model_input: name of the input.
        features: numbers in a row of input_features.
        bins: of the mel filters.
    """

    def __init__(self, tokenizer: Any, model_input: str, features: int, bins: int = 80) -> None:
        self.tokenizer, self.model_input, self.features, self.bins = tokenizer, model_input, features, bins

    def __call__(self, utterances: Sequence[Utterance]) -> Batch:
        """One batch."""
        inputs = [self._input(sound_of(one)) for one in utterances]
        labels = [torch.tensor(self.tokenizer(one.text, add_special_tokens=False).input_ids) for one in utterances]
        return {
            self.model_input: pad_sequence(inputs, batch_first=True),
            "attention_mask": pad_sequence(
                [torch.ones(len(one), dtype=torch.long) for one in inputs], batch_first=True
            ),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    def _input(self, sound: Tensor) -> Tensor:
        if self.model_input == "input_values":
            return normalised(sound)
        frames = normalised(log_mel(sound, self.bins))
        return frames[: self.rows(len(sound)) * (self.features // self.bins)].reshape(-1, self.features)

    def rows(self, samples: int) -> int:
        """The length of the input that so many samples make."""
        if self.model_input == "input_values":
            return samples
        return (samples // HOP + 1) // (self.features // self.bins)


class TemporalClassification:
    """How texts come out of a model with a CTC head.

    Args:
        model: of transformers.
        tokenizer: whose pad token is the blank, and which decodes without blanks and repeated tokens.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def check(self, one: Utterance) -> None:
        """
        Raises:
            InputError: the text has more letters than the model hears moments, so that it can't be read off them.
        """
        letters = self.tokenizer(one.text, add_special_tokens=False).input_ids
        needed = len(letters) + sum(a == b for a, b in pairwise(letters))  # a blank between equal ones
        samples = round(seconds_of(one.sound, str(one)) * RATE)
        moments = self.collate().rows(samples)
        if hasattr(self.model, "_get_feat_extract_output_lengths"):
            moments = int(self.model._get_feat_extract_output_lengths(torch.tensor(moments)))
        if needed > moments:
            raise InputError(f"{one} takes {needed} moments at least, and its sound has {max(0, moments)}")

    def collate(self) -> UtteranceBatch:
        """What makes a batch of utterances."""
        features = getattr(self.model.config, "feature_projection_input_dim", 80)
        return UtteranceBatch(self.tokenizer, self.model.main_input_name, features)

    def count(self, batch: Batch) -> int:
        """The utterances: the loss is a mean over them."""
        return len(batch["labels"])

    def understood(self, batch: Batch, output: Any = None) -> list[str]:
        """Greedy decoding; moments of padding say nothing."""
        if output is None:
            output = self.model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
        logits, blank = output.logits, self.tokenizer.pad_token_id
        share = batch["attention_mask"].float().mean(1, keepdim=True)  # of the longest utterance
        moments = torch.arange(logits.shape[1], device=logits.device)[None]
        tokens = logits.argmax(-1).masked_fill(moments >= (share * logits.shape[1]).ceil(), blank)
        return [self.tokenizer.decode(row).strip() for row in tokens.tolist()]

    def said(self, batch: Batch) -> list[str]:
        """The texts that the labels are."""
        rows = [row[row != IGNORED].tolist() for row in batch["labels"]]
        return ["".join(self.tokenizer.convert_ids_to_tokens(row)).replace("|", " ") for row in rows]

    @staticmethod
    def example_inputs(model: Any, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Features [batch, length, numbers in a row], or samples for models that take these."""
        if model.main_input_name == "input_values":
            return {"input_values": torch.randn(batch, 400 * length, generator=generator)}
        features = getattr(model.config, "feature_projection_input_dim", 80)
        return {"input_features": torch.randn(batch, length, features, generator=generator)}
