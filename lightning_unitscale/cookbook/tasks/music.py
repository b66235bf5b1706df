"""Writing music: a language model of the events of `cookbook/data/music.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_unitscale.cookbook.data.examples import Batch
from lightning_unitscale.cookbook.data.music import ENDS, LONGEST, PASSES, Note, notes_of, write_midi
from lightning_unitscale.cookbook.data.sound import RATE, write_wav
from lightning_unitscale.cookbook.figures import piano_roll
from lightning_unitscale.cookbook.tasks.language_modeling import LanguageModeling
from lightning_unitscale.cookbook.tokenizers import BOS

GIVEN = 4  # one event in so many is given; the model goes on from there
TEMPERATURE = 0.9
SIXTEENTH = 0.15  # seconds


class Music(LanguageModeling):
    """Batches: input_ids and labels, both [batch, sequence], labels one event ahead. Losses are nats per event."""

    counted = "events"
    shows_scores = True
    predicts_held_out = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pitches = MeanMetric()

    def score(self, batch: Batch, output: Any) -> None:
        """Perplexity, and where a note begins whether the likeliest event is this note."""
        super().score(batch, output)
        begins = (batch["labels"] >= 0) & (batch["labels"] < ENDS)
        self.pitches.update((output.logits.argmax(-1) == batch["labels"])[begins].float())

    def scores(self) -> dict[str, Tensor]:
        """Perplexity per event, and the share of beginning notes whose pitch is right."""
        return {"perplexity": self.perplexity.compute(), "pitch_accuracy": self.pitches.compute()}

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:  # type: ignore[override]  # no texts
        """What the model goes on with after the first quarter of each piece, beside how it really goes on.

        Notes are begin and end in sixteenths, and the pitch of MIDI.
        """
        given = batch["input_ids"][:, : batch["input_ids"].shape[1] // GIVEN]
        new = self._continued(given)[:, given.shape[1] :]
        true = batch["labels"][:, given.shape[1] - 1 :]
        return {"notes": [notes_of(row) for row in new.tolist()], "target": [notes_of(_events(row)) for row in true]}

    def _continued(self, given: Tensor) -> Tensor:
        """Events [batch, as many as the model takes]; the same each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            events: Tensor = self.model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_length=self.model.config.max_position_embeddings,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                eos_token_id=None,
                pad_token_id=BOS,
                suppress_tokens=[*range(PASSES + LONGEST, BOS + 1)],  # which say nothing
            )
        return events

    def show(self, batches: DataLoader[Any], folder: Path, settings: Mapping[str, Any]) -> list[str | Path]:
        """The first quarter of a held-out piece and the model's own continuation, to see, to hear, and as MIDI."""
        batch = next(iter(batches))
        given = batch["input_ids"][:1, : batch["input_ids"].shape[1] // GIVEN].to(self.device)
        notes = notes_of(self._continued(given)[0].tolist())
        heard = max((note.end for note in notes_of(given[0].tolist())), default=0)
        roll = piano_roll(notes, folder / "music.png", heard)
        return [roll, write_wav(played(notes), folder / "music.wav"), write_midi(notes, folder / "music.mid")]


def _events(labels: Tensor) -> list[int]:
    return [event for event in labels.tolist() if 0 <= event < PASSES + LONGEST]


def played(notes: Sequence[Note]) -> Tensor:
    """Samples at RATE: each note has four harmonics and dies away."""
    length = max((note.end for note in notes), default=1) * SIXTEENTH
    sound = torch.zeros(int(length * RATE) + 1)
    for note in notes:
        begin, count = int(note.begin * SIXTEENTH * RATE), int((note.end - note.begin) * SIXTEENTH * RATE)
        time = torch.arange(count) / RATE
        angle = 2 * torch.pi * 440.0 * 2 ** ((note.pitch - 69) / 12) * time
        tone = torch.stack([torch.sin(harmonic * angle) / harmonic**2 for harmonic in range(1, 5)]).sum(0)
        fade = (torch.arange(count, 0, -1) / 400).clamp(max=1) * (torch.arange(count) / 200).clamp(max=1)
        sound[begin : begin + count] += 0.15 * tone * fade * torch.exp(-1.5 * time)
    return sound
