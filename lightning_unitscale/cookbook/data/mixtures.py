"""Sound with something in it that is to be taken out: speech with noise, and the user's own recordings.

noise: power ~ 1 / frequency^a, a in 0 … 2, and in every other one a hum with its harmonics; as loud as is said
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_unitscale.cookbook.data.sound import RATE, check_sound, read_sound
from lightning_unitscale.cookbook.data.sound_rows import sound_rows
from lightning_unitscale.cookbook.data.speech import VOICES, read_sentences
from lightning_unitscale.errors import InputError
from lightning_unitscale.near_names import not_found

DIFFERENCE = 0.01  # seconds by which two files of one sound may differ in length


@dataclass(frozen=True)
class Noise:
    """What is added to a sound: the same for the same seed, `decibels` less loud than the sound."""

    decibels: float
    seed: int

    def added_to(self, sound: Tensor) -> Tensor:
        """The sound with the noise, samples at RATE."""
        generator = torch.Generator().manual_seed(self.seed)
        exponent, pitch, hums = torch.rand(3, generator=generator).tolist()
        white = torch.fft.rfft(torch.randn(len(sound), generator=generator))
        frequencies = torch.fft.rfftfreq(len(sound), 1 / RATE).clamp(min=20.0)
        noise = torch.fft.irfft(white * frequencies**-exponent, len(sound))
        noise = noise / power(noise).sqrt()
        if hums > 0.5:
            angle = 2 * torch.pi * (50 + 150 * pitch) * torch.arange(len(sound)) / RATE
            noise = noise + torch.stack([torch.sin(harmonic * angle) / harmonic for harmonic in range(1, 6)]).sum(0)
        wanted = power(sound) / 10 ** (self.decibels / 10)
        mixed: Tensor = sound + noise * (wanted / power(noise)).sqrt()
        return mixed


@dataclass(frozen=True)
class Mixture:
    """A sound, and the same with something in it; those of one group stay on one side of a split.

    Attributes:
        clean: samples at RATE in -1 … 1, or a file.
        mixed: the same, or what is to be added.
        seconds: how long it is.
    """

    clean: Tensor | Path
    mixed: Tensor | Path | Noise
    seconds: float
    group: str

    def sounds(self) -> tuple[Tensor, Tensor]:
        """Mixed and clean samples at RATE, equally many."""
        clean = samples(self.clean)
        mixed = self.mixed.added_to(clean) if isinstance(self.mixed, Noise) else samples(self.mixed)
        length = min(len(clean), len(mixed))
        return mixed[:length], clean[:length]


def power(sound: Tensor) -> Tensor:
    """The mean square."""
    return sound.square().mean().clamp(min=1e-12)


def samples(sound: Tensor | Path) -> Tensor:
    """Of a file, read; at RATE."""
    return sound if isinstance(sound, Tensor) else read_sound(sound)


def noisy_sentences(
    count: int, voices: Sequence[str] = VOICES, quietest: float = -5.0, loudest: float = 10.0, seed: int = 1
) -> list[Mixture]:
    """Sentences read by espeak-ng, each with a noise of its own.

    Args:
        count: of sentences; all voices read each.
        voices: of espeak-ng.
        quietest, loudest: decibels by which speech is louder than noise: evenly spread between the two.
        seed: chooses sentences and noises.
    """
    said = read_sentences(count, voices, seed)
    noises = _noises(len(said), quietest, loudest, seed)
    return [
        Mixture(one.sound, noise, len(one.sound) / RATE, one.text)
        for one, noise in zip(said, noises, strict=True)
        if isinstance(one.sound, Tensor)
    ]


def _noises(count: int, quietest: float, loudest: float, seed: int) -> list[Noise]:
    places = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        Noise(quietest + (loudest - quietest) * place, seed * 1_000_003 + number) for number, place in enumerate(places)
    ]


def sound_folder(
    path: str,
    clean: str = "clean",
    mixed: str = "mixed",
    quietest: float = -5.0,
    loudest: float = 10.0,
    skip_broken: bool = False,
    seed: int = 1,
) -> list[Mixture]:
    """The user's own recordings.

    Args:
        path: a folder of recordings, to which noise is added; or one with the folders `clean` and `mixed`, whose files
            have the same names: any two sounds of which one is to be made of the other.
        clean, mixed: names of these folders.
        quietest, loudest: as for `noisy_sentences`.
        skip_broken: leave out recordings that can't be read or have no partner, and say how many they were.
        seed: chooses the noises.

    Raises:
        InputError: there is no such folder, nothing is in it, or a recording is broken or without its partner.
    """
    root, rates = Path(path).expanduser(), set()
    if not root.is_dir():
        raise InputError(f"data.path={path}: {not_found(root)}")
    paired = (root / clean).is_dir()
    if paired and not (root / mixed).is_dir():
        raise InputError(f"data.path={path}: it has the folder {clean}, but not {mixed}")
    files = sorted(file for file in (root / clean if paired else root).iterdir() if file.is_file())
    if not files:
        raise InputError(f"data.path={path}: no file in {root / clean if paired else root}")
    noises = _noises(len(files), quietest, loudest, seed)

    def read(row: tuple[Path, Noise]) -> Mixture:
        file, noise = row
        seconds, rate = check_sound(file, f"data.path={path}")
        rates.add(rate)
        if not paired:
            return Mixture(file, noise, seconds, file.name)
        partner = root / mixed / file.name
        others, rate = check_sound(partner, f"data.path={path}, the partner of {file.name}")
        rates.add(rate)
        if abs(seconds - others) > DIFFERENCE:
            raise InputError(f"{partner}: {others:.2f} seconds long, and {file} {seconds:.2f}; they must be equal")
        return Mixture(file, partner, min(seconds, others), file.name)

    examples = sound_rows(zip(files, noises, strict=True), read, skip_broken)
    if others := sorted(rates - {RATE}):
        print(f"data.path={path}: recordings at {', '.join(map(str, others))} samples a second are resampled to {RATE}")
    return examples
