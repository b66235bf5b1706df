"""Synthetic sounds: a codec that reconstructs them, and a recogniser that writes down which they were."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_unitscale.cookbook.jobs.job import Batch, Job

SOUNDS = 6  # in the recogniser's alphabet; 0 is CTC's blank
SPOKEN = 5  # in an utterance


@cache
def decaying_tones(length: int = 256, count: int = 1280) -> Tensor:
    """Sums of three decaying sines [count, 1, length] with a peak of about 1."""
    generator = torch.Generator().manual_seed(0)
    frequency, phase, amplitude, decay = torch.rand(4, count, 3, 1, generator=generator)
    time = torch.arange(length)
    waves = (
        amplitude * torch.sin((0.05 + 0.6 * frequency) * time + 6.28 * phase) * torch.exp(-decay * 4 * time / length)
    )
    tones: Tensor = waves.sum(1, keepdim=True) / 2
    return tones


class Snake(nn.Module):
    """x + sin²(αx) / α with a learned α for each channel (Ziyin et al., arXiv 2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, time] -> the same."""
        return x + (self.alpha * x).sin().square() / (self.alpha + 1e-9)


class _DilatedUnit(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            Snake(width),
            weight_norm(nn.Conv1d(width, width, 7, dilation=dilation, padding=3 * dilation)),
            Snake(width),
            weight_norm(nn.Conv1d(width, width, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width, time] -> the same."""
        out: Tensor = x + self.block(x)
        return out


class AudioCodec(Job):
    """Weight-normed convolutions with Snake, as in DAC (Kumar et al., arXiv 2306.06546), without quantization.

    The score is the mean absolute error of the waveform and of log magnitudes of its spectrum, in sum.
    """

    branch_outputs = ("*.block.3",)

    window: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        w = self.width
        encoder: list[nn.Module] = [weight_norm(nn.Conv1d(1, w, 7, padding=3))]
        decoder: list[nn.Module] = [weight_norm(nn.Conv1d(8, 2 * w, 7, padding=3))]
        encoder += [_DilatedUnit(w, 3**layer) for layer in range(self.depth)]
        encoder += [Snake(w), weight_norm(nn.Conv1d(w, 2 * w, 8, stride=4, padding=2)), Snake(2 * w)]
        encoder += [weight_norm(nn.Conv1d(2 * w, 8, 3, padding=1))]
        decoder += [Snake(2 * w), weight_norm(nn.ConvTranspose1d(2 * w, w, 8, stride=4, padding=2))]
        decoder += [_DilatedUnit(w, 3**layer) for layer in range(self.depth)]
        decoder += [Snake(w), weight_norm(nn.Conv1d(w, 1, 7, padding=3)), nn.Tanh()]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.register_buffer("window", torch.hann_window(64), persistent=False)

    def examples(self) -> tuple[Tensor, ...]:
        """Waveforms."""
        return (decaying_tones(),)

    def loss(self, batch: Batch) -> Tensor:
        """Waveform and spectrum."""
        (waves,) = batch
        made = self.decoder(self.encoder(waves))
        return F.l1_loss(made, waves) + 0.1 * F.l1_loss(self._spectrum(made), self._spectrum(waves))

    def _spectrum(self, waves: Tensor) -> Tensor:
        found = torch.stft(waves[:, 0], 64, 16, window=self.window, return_complex=True)
        return found.abs().clamp(min=1e-2).log()


@cache
def utterances(frames: int = 48, channels: int = 16, count: int = 1280) -> tuple[Tensor, Tensor]:
    """Spectrograms [count, channels, frames] of SPOKEN sounds each, and which they are [count, SPOKEN], from 1 on."""
    generator = torch.Generator().manual_seed(0)
    spectra = torch.randn(SOUNDS + 1, channels, generator=generator)
    spectra[0] = 0  # silence
    spoken = torch.randint(1, SOUNDS + 1, (count, SPOKEN), generator=generator)
    slots = frames // SPOKEN
    said = torch.zeros(count, frames, dtype=torch.long)
    for position in range(SPOKEN):
        begins, lengths = torch.randint(3, (2, count), generator=generator)
        time = torch.arange(frames) - position * slots
        inside = (time >= begins[:, None]) & (time < begins[:, None] + lengths[:, None] + 3)
        said = torch.where(inside, spoken[:, position, None], said)
    frames_ = spectra[said] + torch.randn(count, frames, channels, generator=generator)
    return frames_.transpose(1, 2), spoken


class SpeechCTC(Job):
    """Convolutions and a transformer encoder of torch; the CTC loss in nats per sound."""

    branch_outputs = ("*.out_proj", "*.linear2")

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        w = self.width
        self.front = nn.Sequential(nn.Conv1d(16, w, 3, padding=1), nn.GELU(), nn.Conv1d(w, w, 3, padding=1), nn.GELU())
        layer = nn.TransformerEncoderLayer(w, w // 16, 4 * w, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, self.depth, enable_nested_tensor=False)
        self.norm, self.last = nn.LayerNorm(w), nn.Linear(w, SOUNDS + 1)

    def examples(self) -> tuple[Tensor, ...]:
        """Spectrograms and sounds."""
        return utterances()

    def loss(self, batch: Batch) -> Tensor:
        """CTC."""
        spectrograms, spoken = batch
        x = self.encoder(self.front(spectrograms).transpose(1, 2))
        log_probabilities = self.last(self.norm(x)).log_softmax(-1).transpose(0, 1)
        frames = torch.full((len(spoken),), len(log_probabilities), dtype=torch.long)
        return F.ctc_loss(log_probabilities, spoken, frames, torch.full_like(frames, SPOKEN))
