"""Saying a text: letters into a mel spectrogram, and that into sound by Griffin and Lim's iteration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lightning_unitscale.cookbook.data.continuing_loader import loading
from lightning_unitscale.cookbook.data.examples import IGNORED, Batch, Examples, split_by
from lightning_unitscale.cookbook.data.sound import HOP, RATE, from_log_mel, log_mel, seconds_of, write_wav
from lightning_unitscale.cookbook.data.sound_rows import sound_rows
from lightning_unitscale.cookbook.data.speech import Utterance, sound_of
from lightning_unitscale.cookbook.figures import spectrograms
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.tasks import text_to_mel  # noqa: F401  # tells transformers of the model
from lightning_unitscale.cookbook.tasks.alignment import warped_distance
from lightning_unitscale.cookbook.tasks.classification import check_classes, numbers_of
from lightning_unitscale.cookbook.tasks.mel_distance import DECIBELS, MelDistance
from lightning_unitscale.cookbook.tasks.task import Task
from lightning_unitscale.errors import InputError

MEAN, SPREAD = -8.0, 4.5  # of log-mel frames of speech, about; the model's frames have 0 and 1
LISTENED = 3  # utterances that are shown


class SpokenBatch:
    """input_ids and attention_mask [batch, letters], speaker_ids [batch], labels [batch, frames, bins].

    Labels are log-mel frames less MEAN, over SPREAD; IGNORED beyond the end.

    Args:
        tokenizer: of the texts.
        voices: speaker -> number.
        bins: of the mel filters.
    """

    def __init__(self, tokenizer: Any, voices: Mapping[str, int], bins: int) -> None:
        self.tokenizer, self.voices, self.bins = tokenizer, voices, bins

    def __call__(self, utterances: Sequence[Utterance]) -> Batch:
        """One batch."""
        mels = [(log_mel(sound_of(one), self.bins) - MEAN) / SPREAD for one in utterances]
        return {
            **letters_of([one.text for one in utterances], self.tokenizer),
            "speaker_ids": torch.tensor([self.voices[one.speaker] for one in utterances]),
            "labels": pad_sequence(mels, batch_first=True, padding_value=IGNORED),
        }


def letters_of(texts: Sequence[str], tokenizer: Any) -> Batch:
    """input_ids and attention_mask, [batch, letters]."""
    rows = [torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    mask = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence(mask, batch_first=True),
    }


class SpeechSynthesis(Task):
    """Batches: those of `SpokenBatch`. The classes of the model's config are the voices."""

    heads = ("AutoModelForTextToSpectrogram",)
    counted = "utterances"
    predicts_held_out = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distance = MelDistance()

    @classmethod
    def check(cls, cfg: DictConfig) -> None:
        """No voice is held out: one that was never heard can't be spoken with."""
        if cfg.data.get("held_out_speaker") is not None:
            raise InputError(
                f"data.held_out_speaker={cfg.data.held_out_speaker}: a model can't speak with a voice it never heard; "
                "say data.held_out_speaker=null"
            )

    @classmethod
    def classes(cls, examples: Sequence[Utterance]) -> list[str]:
        """The speakers, in alphabetical order."""
        return sorted({one.speaker for one in examples})

    @classmethod
    def data_module(cls, examples: Sequence[Utterance], found: Pretrained, cfg: DictConfig) -> Examples:
        """Batches of utterances; those of one text stay on one side of the split.

        Raises:
            InputError: a text has no letter, or more letters than its sound has frames.
        """
        tokenizer, voices = found.text_tokenizer(), numbers_of(found.model.config)
        check_classes(cls.classes(examples), voices)

        def checked(one: Utterance) -> Utterance:
            letters = len(tokenizer(one.text, add_special_tokens=False).input_ids)
            frames = round(seconds_of(one.sound, str(one)) * RATE) // HOP + 1
            if not 0 < letters <= frames:
                raise InputError(
                    f"{one}: {letters} letters that the tokenizer knows, in {frames} frames of 10 ms: every letter "
                    "needs one at least, and there must be one"
                )
            return one

        examples = sound_rows(examples, checked, cfg.data.get("skip_broken"))
        parts = split_by(lambda one: one.text, examples, cfg.data.held_out)
        return Examples(parts, SpokenBatch(tokenizer, voices, found.model.config.num_mel_bins), **loading(cfg))

    def count(self, batch: Batch) -> int:
        """The utterances."""
        return len(batch["labels"])

    def score(self, batch: Batch, output: Any) -> None:
        """How far what the model says by itself is from the true sound."""
        for found, true in zip(self.spoken(batch), true_mels(batch), strict=True):
            self.distance.update(found, true)

    def scores(self) -> dict[str, Tensor]:
        """In decibels: the distance, and that of the mean frame in every place."""
        values: dict[str, Tensor] = self.distance.compute()
        return values

    def spoken(self, batch: Batch) -> list[Tensor]:
        """Log-mel frames [frames, bins] of each text, with the model's own durations."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        output = self.model(**inputs)
        rows = zip(output.spectrogram.float(), output.lengths.tolist(), strict=True)
        return [row[:length] * SPREAD + MEAN for row, length in rows]

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The text, how long the model takes to say it, and, where the true sound is known, how far from it that is."""
        mels = self.spoken(batch)
        rows = [ids[there.bool()] for ids, there in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        texts = ["".join(self.tokenizer.convert_ids_to_tokens(row.tolist())).replace("|", " ") for row in rows]
        columns: dict[str, Any] = {"text": texts, "seconds": [len(mel) * HOP / RATE for mel in mels]}
        if "labels" in batch:
            pairs = list(zip(mels, true_mels(batch), strict=True))
            columns["true_seconds"] = [len(true) * HOP / RATE for _, true in pairs]
            columns["mel_distance"] = [DECIBELS * warped_distance(mel, true) for mel, true in pairs]
        return columns

    def collate_texts(self, texts: Sequence[str], generation: Mapping[str, Any]) -> Callable[[list[str]], Batch]:
        """Letters.

        Raises:
            InputError: a text has none.
        """
        for number, text in enumerate(texts, start=1):
            if not self.tokenizer(text, add_special_tokens=False).input_ids:
                raise InputError(f"row {number} says {text!r}, of which the tokenizer knows no letter")
        return lambda batch: letters_of(batch, self.tokenizer)

    @torch.inference_mode()
    def files_of(self, texts: Sequence[str], folder: Path) -> list[Path]:
        """A WAV file for each text, named by its row."""
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for row, text in enumerate(texts):
            letters = {name: tensor.to(self.device) for name, tensor in letters_of([text], self.tokenizer).items()}
            (mel,) = self.spoken(letters)
            files.append(write_wav(from_log_mel(mel.cpu()), folder / f"row_{row}.wav"))
        return files

    def show(self, batches: DataLoader[Any], folder: Path, settings: Mapping[str, Any]) -> list[str | Path]:
        """Some texts as the model says them, and as they were said: spectrograms, and sound."""
        utterances: Any = batches.dataset
        chosen: list[Utterance] = [utterances[number] for number in range(min(LISTENED, len(utterances)))]
        assert batches.collate_fn is not None
        batch = {name: tensor.to(self.device) for name, tensor in batches.collate_fn(chosen).items()}
        mels = [mel.cpu() for mel in self.spoken(batch)]
        pairs = zip(chosen, mels, true_mels(batch), strict=True)
        rows = [(f"{one.speaker}: {one.text}", {"model": mel, "true": true.cpu()}) for one, mel, true in pairs]
        shown: list[str | Path] = [spectrograms(rows, folder / "spectrograms.png")]
        for number, (one, mel) in enumerate(zip(chosen, mels, strict=True), start=1):
            shown.append(f"said by the model, then by {one.speaker or 'the speaker'}: {one.text}")
            shown.append(write_wav(from_log_mel(mel), folder / f"said_{number}.wav"))
            shown.append(write_wav(sound_of(one), folder / f"true_{number}.wav"))
        return shown

    @staticmethod
    def example_inputs(model: Any, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
        """Letters and durations [batch, length]: rounding of its own would not always be the same."""
        generator = torch.Generator().manual_seed(seed)
        letters = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
        return {"input_ids": letters, "durations": torch.randint(1, 6, (batch, length), generator=generator)}


def true_mels(batch: Batch) -> list[Tensor]:
    """Log-mel frames [frames, bins] of each utterance."""
    return [row[row[:, 0] != IGNORED] * SPREAD + MEAN for row in batch["labels"].float()]
