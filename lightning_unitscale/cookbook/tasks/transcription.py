"""Reading speech with an encoder and a decoder that writes token by token, as Whisper does (arXiv 2212.04356)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import WhisperFeatureExtractor

from lightning_unitscale.cookbook.data.examples import IGNORED, Batch
from lightning_unitscale.cookbook.data.sound import HOP, RATE, seconds_of
from lightning_unitscale.cookbook.data.speech import Utterance, sound_of
from lightning_unitscale.errors import InputError


class TranscriptBatch:
    """input_features [batch, mel bins, frames], as Whisper computes them, and labels [batch, longest text] with eos.

    Args:
        tokenizer: of the texts, with an eos token.
        config: of the model: it hears a fixed time, which silence fills up.
    """

    def __init__(self, tokenizer: Any, config: Any) -> None:
        self.tokenizer, self.start = tokenizer, config.decoder_start_token_id
        samples = frames_heard(config) * HOP
        self.features = WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=samples / RATE)
        self.features.n_samples, self.features.nb_max_frames = samples, frames_heard(config)

    def __call__(self, utterances: Sequence[Utterance]) -> Batch:
        """One batch."""
        sounds = [sound_of(one).numpy() for one in utterances]
        features: Tensor = self.features(sounds, sampling_rate=RATE, return_tensors="pt").input_features
        labels = [self.labels_of(one.text) for one in utterances]
        return {
            "input_features": features,
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    def labels_of(self, text: str) -> Tensor:
        """Tokens and eos; the model itself puts its first decoder token in front."""
        ids, eos = self.tokenizer(text).input_ids, self.tokenizer.eos_token_id
        ids = ids[1:] if ids[:1] == [self.start] else ids
        return torch.tensor(ids if ids[-1:] == [eos] else [*ids, eos])


class Transcription:
    """How texts come out of a model that writes them.

    Args:
        model: Whisper, or of its kind.
        tokenizer: with an eos token.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def check(self, one: Utterance) -> None:
        """
        Raises:
            InputError: the utterance or its text is longer than the model takes.
        """
        batch, config = self.collate(), self.model.config
        seconds, longest = seconds_of(one.sound, str(one)), frames_heard(config) * HOP / RATE
        if seconds > longest:
            raise InputError(
                f"{one} takes {seconds:.2f} s, and the model hears {longest:.2f} s: "
                "model.config.max_source_positions, 50 a second"
            )
        if (tokens := len(batch.labels_of(one.text))) > config.max_target_positions:
            raise InputError(f"{one} has {tokens} tokens, and the model writes {config.max_target_positions}")

    def collate(self) -> TranscriptBatch:
        """What makes a batch of utterances.

        Raises:
            InputError: the model takes another input than Whisper's, or the tokenizer has no eos token.
        """
        config = self.model.config
        if self.model.main_input_name != "input_features" or not hasattr(config, "num_mel_bins"):
            raise InputError(f"{type(self.model).__name__} is not of Whisper's kind; nobody knows what it is to hear")
        if self.tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no eos token, so a text would never end: model.tokenizer=characters")
        return TranscriptBatch(self.tokenizer, config)

    def count(self, batch: Batch) -> int:
        """The tokens: the loss is a mean over them."""
        return int((batch["labels"] != IGNORED).sum())

    def understood(self, batch: Batch, output: Any = None) -> list[str]:
        """Greedily, up to the longest of the texts."""
        written = self.model.generate(
            input_features=batch["input_features"], max_new_tokens=batch["labels"].shape[1], do_sample=False
        )
        return [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]

    def said(self, batch: Batch) -> list[str]:
        """The texts that the labels are."""
        rows = [row[row != IGNORED].tolist() for row in batch["labels"]]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    @staticmethod
    def example_inputs(model: Any, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Features [batch, mel bins, frames], and some tokens."""
        shape = (batch, model.config.num_mel_bins, frames_heard(model.config))
        tokens = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
        return {"input_features": torch.randn(shape, generator=generator), "decoder_input_ids": tokens}


def frames_heard(config: Any) -> int:
    """The mel frames that the encoder takes, twice its positions."""
    return 2 * int(config.max_source_positions)
