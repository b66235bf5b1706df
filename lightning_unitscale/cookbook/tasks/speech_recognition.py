"""Writing down what is said: a letter or none for every moment (CTC), or letter by letter with a decoder (Whisper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.text import CharErrorRate, WordErrorRate

from lightning_unitscale.cookbook.data.continuing_loader import loading
from lightning_unitscale.cookbook.data.examples import Batch, Examples, split_by
from lightning_unitscale.cookbook.data.sound import write_wav
from lightning_unitscale.cookbook.data.sound_rows import sound_rows
from lightning_unitscale.cookbook.data.speech import Utterance, sound_of
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.tasks.task import Task
from lightning_unitscale.cookbook.tasks.temporal_classification import TemporalClassification
from lightning_unitscale.cookbook.tasks.transcription import Transcription
from lightning_unitscale.errors import InputError

LISTENED = 4  # utterances that are shown


def reader_of(model: Any, tokenizer: Any) -> TemporalClassification | Transcription:
    """How texts come out of this model."""
    reader = Transcription if model.config.is_encoder_decoder else TemporalClassification
    return reader(model, tokenizer)


class SpeechRecognition(Task):
    """Batches: those of `UtteranceBatch` or, with a decoder, of `TranscriptBatch`."""

    heads = ("AutoModelForCTC", "AutoModelForSpeechSeq2Seq")
    counted = "utterances or, with a decoder, tokens"
    predicts_held_out = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.word_errors, self.character_errors = WordErrorRate(), CharErrorRate()

    @property
    def reader(self) -> TemporalClassification | Transcription:
        """How texts come out of the model."""
        return reader_of(self.model, self.tokenizer)

    @classmethod
    def data_module(cls, examples: Sequence[Utterance], found: Pretrained, cfg: DictConfig) -> Examples:
        """Batches of utterances; those of one text, and all of the speaker held out, stay on one side of the split.

        Raises:
            InputError: the tokenizer has no token for a text, the model can't take one, or a part of the split would be
                empty.
        """
        tokenizer = found.text_tokenizer()
        reader = reader_of(found.model, tokenizer)

        def checked(one: Utterance) -> Utterance:
            if not tokenizer(one.text, add_special_tokens=False).input_ids:
                raise InputError(f"{one}: the tokenizer knows no letter of it")
            reader.check(one)
            return one

        examples = sound_rows(examples, checked, cfg.data.get("skip_broken"))
        training, validation, test = split_by(lambda one: one.text, examples, cfg.data.held_out)
        if (voice := cfg.data.held_out_speaker) is not None:
            training, validation = ([one for one in part if one.speaker != voice] for part in (training, validation))
            test = [one for one in test if one.speaker == voice]
            if not (training and validation and test):
                raise InputError(
                    f"data.held_out_speaker={voice}: without this speaker, or with it alone, a part is empty"
                )
        return Examples([training, validation, test], reader.collate(), **loading(cfg))

    def count(self, batch: Batch) -> int:
        """What the loss is a mean over."""
        return self.reader.count(batch)

    def score(self, batch: Batch, output: Any) -> None:
        """Word and character error rates of the likeliest tokens."""
        found, said = self.reader.understood(batch, output), self.reader.said(batch)
        self.word_errors.update(found, said)
        self.character_errors.update(found, said)

    def scores(self) -> dict[str, Tensor]:
        """Word and character error rates of the likeliest tokens."""
        values: dict[str, Tensor] = {
            "word_error_rate": self.word_errors.compute(),
            "character_error_rate": self.character_errors.compute(),
        }
        return values

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, list[str]]:
        """What was understood, beside what was said."""
        return {"text": self.reader.understood(batch), "target": self.reader.said(batch)}

    def show(self, batches: DataLoader[Any], folder: Path, settings: Mapping[str, Any]) -> list[str | Path]:
        """Some utterances to listen to, with what was understood and what was said."""
        shown: list[str | Path] = []
        utterances: Any = batches.dataset
        for number in range(min(LISTENED, len(utterances))):
            one: Utterance = utterances[number]
            assert batches.collate_fn is not None
            batch = {name: tensor.to(self.device) for name, tensor in batches.collate_fn([one]).items()}
            answer = self.predict_step(batch, 0)
            shown.append(write_wav(sound_of(one), folder / f"utterance_{number + 1}.wav"))
            shown.append(f"understood: {answer['text'][0]}\nsaid:       {answer['target'][0]}")
        return shown

    @staticmethod
    def example_inputs(model: Any, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
        """What the model hears and, with a decoder, some tokens."""
        generator = torch.Generator().manual_seed(seed)
        return reader_of(model, None).example_inputs(model, batch, length, generator)
