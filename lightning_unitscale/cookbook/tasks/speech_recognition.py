"""Writing down what is said, by connectionist temporal classification: a letter or none for every moment of sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torchmetrics.text import CharErrorRate, WordErrorRate

from lightning_unitscale.cookbook.data.continuing_loader import loading
from lightning_unitscale.cookbook.data.examples import IGNORED, Batch, Examples, split_by
from lightning_unitscale.cookbook.data.sound import log_mel, normalised, read_sound, write_wav
from lightning_unitscale.cookbook.data.speech import Utterance
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.tasks.task import Task
from lightning_unitscale.errors import InputError

LISTENED = 4  # utterances that are shown


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
        inputs = [
            self._input(one.sound if isinstance(one.sound, Tensor) else read_sound(one.sound)) for one in utterances
        ]
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
        frames, together = normalised(log_mel(sound, self.bins)), self.features // self.bins
        return frames[: len(frames) // together * together].reshape(-1, self.features)


class SpeechRecognition(Task):
    """Batches: those of `UtteranceBatch`."""

    heads = ("AutoModelForCTC",)
    counted = "utterances"
    predicts_held_out = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.word_errors, self.character_errors = WordErrorRate(), CharErrorRate()

    @classmethod
    def data_module(cls, examples: Sequence[Utterance], found: Pretrained, cfg: DictConfig) -> Examples:
        """Batches of utterances; those of one text, and all of the speaker held out, stay on one side of the split.

        Raises:
            InputError: the tokenizer has no token for a text, or a part of the split would be empty.
        """
        tokenizer = found.text_tokenizer()
        for number, one in enumerate(examples, start=1):
            if not tokenizer(one.text, add_special_tokens=False).input_ids:
                raise InputError(f"row {number} of the data says {one.text!r}, of which the tokenizer knows no letter")
        training, validation, test = split_by(lambda one: one.text, examples, cfg.data.held_out)
        if (voice := cfg.data.held_out_speaker) is not None:
            training, validation = ([one for one in part if one.speaker != voice] for part in (training, validation))
            test = [one for one in test if one.speaker == voice]
            if not (training and validation and test):
                raise InputError(
                    f"data.held_out_speaker={voice}: without this speaker, or with it alone, a part is empty"
                )
        features = getattr(found.model.config, "feature_projection_input_dim", 80)
        collate = UtteranceBatch(tokenizer, found.model.main_input_name, features)
        return Examples([training, validation, test], collate, **loading(cfg))

    def count(self, batch: Batch) -> int:
        """The utterances: the loss is a mean over them."""
        return len(batch["labels"])

    def score(self, batch: Batch, output: Any) -> None:
        """Word and character error rates of the likeliest token at each moment."""
        found, said = self._texts(batch, output.logits), self._said(batch)
        self.word_errors.update(found, said)
        self.character_errors.update(found, said)

    def scores(self) -> dict[str, Tensor]:
        """Word and character error rates of the likeliest token at each moment."""
        values: dict[str, Tensor] = {
            "word_error_rate": self.word_errors.compute(),
            "character_error_rate": self.character_errors.compute(),
        }
        return values

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, list[str]]:
        """What was understood, beside what was said."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return {"text": self._texts(batch, self.model(**inputs).logits), "target": self._said(batch)}

    def _texts(self, batch: Batch, logits: Tensor) -> list[str]:
        """Greedy decoding; moments of padding say nothing."""
        blank = self.tokenizer.pad_token_id
        share = batch["attention_mask"].float().mean(1, keepdim=True)  # of the longest utterance
        moments = torch.arange(logits.shape[1], device=logits.device)[None]
        tokens = logits.argmax(-1).masked_fill(moments >= (share * logits.shape[1]).ceil(), blank)
        return [self.tokenizer.decode(row).strip() for row in tokens.tolist()]

    def _said(self, batch: Batch) -> list[str]:
        rows = [row[row != IGNORED].tolist() for row in batch["labels"]]
        return ["".join(self.tokenizer.convert_ids_to_tokens(row)).replace("|", " ") for row in rows]

    def show(self, batches: DataLoader[Any], folder: Path, settings: Mapping[str, Any]) -> list[str | Path]:
        """Some utterances to listen to, with what was understood and what was said."""
        shown: list[str | Path] = []
        utterances: Any = batches.dataset
        for number in range(min(LISTENED, len(utterances))):
            one: Utterance = utterances[number]
            assert batches.collate_fn is not None
            batch = {name: tensor.to(self.device) for name, tensor in batches.collate_fn([one]).items()}
            answer = self.predict_step(batch, 0)
            sound = one.sound if isinstance(one.sound, Tensor) else read_sound(one.sound)
            shown.append(write_wav(sound, folder / f"utterance_{number + 1}.wav"))
            shown.append(f"understood: {answer['text'][0]}\nsaid:       {answer['target'][0]}")
        return shown

    @staticmethod
    def example_inputs(model: Any, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
        """Features [batch, length, numbers in a row], or samples for models that take these."""
        generator = torch.Generator().manual_seed(seed)
        if model.main_input_name == "input_values":
            return {"input_values": torch.randn(batch, 400 * length, generator=generator)}
        features = getattr(model.config, "feature_projection_input_dim", 80)
        return {"input_features": torch.randn(batch, length, features, generator=generator)}
