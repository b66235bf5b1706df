"""Making one sound of another: taking noise out of it, or one voice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from lightning_unitscale.cookbook.data.continuing_loader import loading
from lightning_unitscale.cookbook.data.examples import Batch, Examples, split_by
from lightning_unitscale.cookbook.data.mixtures import Mixture
from lightning_unitscale.cookbook.data.sound import RATE, log_mel, write_wav
from lightning_unitscale.cookbook.figures import spectrograms
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.tasks import sound_unet  # noqa: F401  # tells transformers of the model
from lightning_unitscale.cookbook.tasks.task import Task

SHORTEST = 0.25  # of a window: what is left of a sound and shorter than this share is left out
SILENT = 1e-3  # of the mixture's power: a target below has nothing to be compared with
NEGLIGIBLE = 1e-3  # of the mixture's power: the loss does not ask for a smaller error (30 dB)
HEARD = 3  # sounds that are shown


@dataclass(frozen=True)
class Window:
    """A part of a sound that begins so many seconds after its beginning."""

    mixture: Mixture
    begin: float


class WindowBatch:
    """input_values and labels [batch, samples]: mixed sound with a power of 1, and clean sound in the same units.

    Args:
        seconds: of each window; what is shorter ends in silence.
    """

    def __init__(self, seconds: float) -> None:
        self.length = int(seconds * RATE)

    def __call__(self, windows: Sequence[Window]) -> Batch:
        """One batch."""
        mixed, clean = torch.zeros(2, len(windows), self.length)
        for row, window in enumerate(windows):
            begin = int(window.begin * RATE)
            sounds = [sound[begin : begin + self.length] for sound in window.mixture.sounds()]
            size = sounds[0].square().mean().sqrt().clamp(min=1e-6)
            mixed[row, : len(sounds[0])], clean[row, : len(sounds[1])] = sounds[0] / size, sounds[1] / size
        return {"input_values": mixed, "labels": clean}


class AudioEditing(Task):
    """Batches: those of `WindowBatch`. The loss is the error's power beside the target's, in decibels."""

    heads = ("AutoModel",)
    counted = "windows"
    predicts_held_out = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.before, self.after = MeanMetric(), MeanMetric()

    @classmethod
    def data_module(cls, examples: Sequence[Mixture], found: Pretrained, cfg: DictConfig) -> Examples:
        """Batches of windows; those of one group stay on one side of the split."""
        seconds = cfg.task.seconds
        parts = split_by(lambda one: one.group, examples, cfg.data.held_out)
        windows = [[window for one in part for window in windows_of(one, seconds)] for part in parts]
        return Examples(windows, WindowBatch(seconds), **loading(cfg))

    def loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """10 log10 of error power over target power, a mean over windows; NEGLIGIBLE is added to both."""
        output = self.model(input_values=batch["input_values"])
        error = (output.sound - batch["labels"]).square().mean(1) + NEGLIGIBLE
        target = batch["labels"].square().mean(1) + NEGLIGIBLE
        return (10 * torch.log10(error / target)).mean(), output

    def count(self, batch: Batch) -> int:
        """The windows."""
        return len(batch["labels"])

    def score(self, batch: Batch, output: Any) -> None:
        """Scale-invariant signal-to-distortion ratio before and after; windows with a silent target don't count."""
        before, after = ratios(batch, output.sound)
        self.before.update(before)
        self.after.update(after)

    def scores(self) -> dict[str, Tensor]:
        """In decibels: the ratio (Le Roux et al., 2018, arXiv 1811.02508), and how much it is better than before."""
        after = self.after.compute()
        return {"si_sdr": after, "si_sdr_improvement": after - self.before.compute()}

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Of every window, the ratios in decibels; not a number where the target is silent."""
        before, after = ratios(batch, self.model(input_values=batch["input_values"]).sound, keep_silent=True)
        return {"si_sdr_before": before, "si_sdr": after}

    def show(self, batches: DataLoader[Any], folder: Path, settings: Mapping[str, Any]) -> list[str | Path]:
        """Whole sounds before, after, and as they are to be: spectrograms, and to listen to."""
        windows: Any = batches.dataset
        chosen = {id(window.mixture): window.mixture for window in (windows[n] for n in range(len(windows)))}
        rows: list[tuple[str, dict[str, Tensor]]] = []
        shown: list[str | Path] = []
        for number, mixture in enumerate(list(chosen.values())[:HEARD], start=1):
            mixed, clean = mixture.sounds()
            size = mixed.square().mean().sqrt().clamp(min=1e-6)
            after = self.model(input_values=(mixed / size)[None].to(self.device)).sound[0].float().cpu() * size
            sounds = {"before": mixed, "after": after, "true": clean}
            rows.append((mixture.group, {name: log_mel(sound) for name, sound in sounds.items()}))
            shown.append(f"before, after, and as it is to be: {mixture.group}")
            shown += [write_wav(sound, folder / f"{name}_{number}.wav") for name, sound in sounds.items()]
        return [spectrograms(rows, folder / "spectrograms.png"), *shown]


def windows_of(mixture: Mixture, seconds: float) -> list[Window]:
    """As many as it has; a last one that would be shorter than SHORTEST is left out, unless it is the only one."""
    count = max(1, int(mixture.seconds / seconds + 1 - SHORTEST))
    return [Window(mixture, number * seconds) for number in range(count)]


def ratios(batch: Batch, found: Tensor, keep_silent: bool = False) -> tuple[Tensor, Tensor]:
    """Scale-invariant signal-to-distortion ratios of each window, before and after, in decibels.

    Args:
        keep_silent: windows with a silent target stand there as not a number; else they are left out.
    """
    clean = batch["labels"].float()
    heard = clean.square().mean(1) > SILENT
    before, after = (
        scale_invariant_signal_distortion_ratio(sound.float(), clean) for sound in (batch["input_values"], found)
    )
    if keep_silent:
        return before.where(heard, torch.nan), after.where(heard, torch.nan)
    return before[heard], after[heard]
