"""Sound: files, sampling rates, and spectrograms.

    log-mel[t, m] = ln(max(Σ_f filter[f, m] · |STFT[t, f]|², 1e-6)), then mean 0 and RMS 1 over the utterance

Frames are 25 ms long and begin every 10 ms. `from_log_mel` goes back: the filters' pseudo-inverse, then phases by
Griffin and Lim's iteration (1984).
"""

from __future__ import annotations

import math
import wave
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import scipy.signal
import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from lightning_unitscale.errors import InputError

RATE = 16_000  # samples a second, of all that models are given
HOP, WINDOW, FFT = 160, 400, 512  # samples
FLOOR = 1e-6
SHORTEST = 4  # frames that can be made sound of; silence follows where there are fewer
BLOCK = 1 << 20  # samples read at once


@cache
def filters(bins: int) -> Tensor:
    """[FFT // 2 + 1, bins]."""
    bank = mel_filter_bank(FFT // 2 + 1, bins, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(bank).float()


def log_mel(sound: Tensor, bins: int = 80) -> Tensor:
    """[frames, bins] of samples at RATE, not normalised."""
    spectrum = torch.stft(sound, FFT, HOP, WINDOW, torch.hann_window(WINDOW), return_complex=True)  # [bins, frames]
    power = spectrum.abs().square().T
    return (power @ filters(bins)).clamp(min=FLOOR).log()


def normalised(values: Tensor) -> Tensor:
    """With mean 0 and RMS 1."""
    return (values - values.mean()) / values.std().clamp(min=1e-5)


def from_log_mel(mel: Tensor, iterations: int = 32) -> Tensor:
    """Samples at RATE of what `log_mel` gives, [frames, bins]; phases are found by iteration."""
    length = max(1, len(mel) - 1) * HOP
    mel = torch.nn.functional.pad(mel, (0, 0, 0, max(0, SHORTEST - len(mel))), value=math.log(FLOOR))
    power = (mel.exp() @ torch.linalg.pinv(filters(mel.shape[1]))).clamp(min=0)
    size, window = power.sqrt().T, torch.hann_window(WINDOW)
    phase = torch.exp(2j * math.pi * torch.rand(size.shape, generator=torch.Generator().manual_seed(0)))
    for _ in range(iterations):
        sound = torch.istft(size * phase, FFT, HOP, WINDOW, window)
        spectrum = torch.stft(sound, FFT, HOP, WINDOW, window, return_complex=True)
        phase = spectrum / spectrum.abs().clamp(min=1e-8)
    return torch.istft(size * phase, FFT, HOP, WINDOW, window)[:length]


def resampled(sound: Tensor, rate: int) -> Tensor:
    """At RATE."""
    if rate == RATE:
        return sound
    common = math.gcd(rate, RATE)
    return torch.from_numpy(scipy.signal.resample_poly(sound.numpy(), RATE // common, rate // common)).float()


def read_sound(file: Path) -> Tensor:
    """Samples at RATE in -1 … 1; channels are averaged."""
    samples, rate = _soundfile().read(file, dtype="float32", always_2d=True)
    return resampled(torch.from_numpy(samples).mean(1), rate)


def seconds_of(sound: Tensor | Path, where: str) -> float:
    """How long samples at RATE, or those of a file, take; a file is looked at as by `check_sound`."""
    return len(sound) / RATE if isinstance(sound, Tensor) else check_sound(sound, where)[0]


def check_sound(file: Path, where: str) -> tuple[float, int]:
    """Seconds and sampling rate of a file, all of which can be read.

    Args:
        where: of the row that names it, for the message.

    Raises:
        InputError: there is no such file, it holds no sound, it is cut short, or a sample of it is no number.
    """
    soundfile = _soundfile()
    if not file.is_file():
        raise InputError(f"{where}: there is no file {file}")
    count = 0
    try:
        with soundfile.SoundFile(file) as found:
            for block in found.blocks(BLOCK, dtype="float32"):
                if not numpy.isfinite(block).all():
                    raise InputError(f"{where}: {file} has samples that are no numbers")
                count += len(block)
            said, rate = found.frames, found.samplerate
    except soundfile.LibsndfileError as error:
        raise InputError(f"{where}: {file} is no sound that can be read ({error})") from error
    if not count or count < said:
        raise InputError(f"{where}: {file} has {count} samples, and says that it has {said}")
    return count / rate, rate


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError as error:
        raise InputError("sound files need soundfile: pip install 'lightning-unitscale[audio]'") from error
    return soundfile


def write_wav(sound: Tensor, file: Path, rate: int = RATE) -> Path:
    """16 bits a sample, one channel; louder than -1 … 1 is made quieter."""
    samples = sound.detach().float().cpu()
    samples = samples / samples.abs().max().clamp(min=1.0)
    with wave.open(str(file), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(rate)
        stream.writeframes((samples * 32767).numpy().astype(numpy.int16).tobytes())
    return file
