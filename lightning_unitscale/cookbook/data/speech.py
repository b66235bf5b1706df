"""Speech and what is said: sentences read by espeak-ng, and the user's own recordings by a manifest.

The sentences have the grammar of the GRID corpus (Cooke et al., 2006), without its letters: "place red by four now". No
sentence is in training and in the test, and one voice reads for the test alone.
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy
import torch
from torch import Tensor

from lightning_unitscale.cookbook.data.sound import RATE, check_sound, read_sound, resampled
from lightning_unitscale.cookbook.data.sound_rows import sound_rows
from lightning_unitscale.cookbook.data.table_files import TableRow, table_rows
from lightning_unitscale.errors import InputError

GRAMMAR = (
    ("bin", "lay", "place", "set"),
    ("blue", "green", "red", "white"),
    ("at", "by", "in", "with"),
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    ("again", "now", "please", "soon"),
)
LONGEST_SHOWN = 60  # letters of a text in messages
VOICES = ("en-us", "en-gb-scotland", "en-us+f1", "en-029+m3", "en-gb-x-rp+m7")  # the last is held out


@dataclass(frozen=True)
class Utterance:
    """Sound and what is said; utterances of one text stay on one side of a split.

    Attributes:
        sound: samples at RATE in -1 … 1, or a file.
        text: what is said.
        speaker: who says it.
        place: the manifest and row that it is of, for messages; what is read by a voice has none.
    """

    sound: Tensor | Path
    text: str
    speaker: str
    place: str = ""

    def __str__(self) -> str:
        """Where it is from and what it says, for messages."""
        return f"{self.place}{': ' if self.place else ''}{shorten(self.text, LONGEST_SHOWN)!r}"


def sound_of(utterance: Utterance) -> Tensor:
    """Its samples at RATE."""
    return utterance.sound if isinstance(utterance.sound, Tensor) else read_sound(utterance.sound)


def read_sentences(count: int, voices: Sequence[str] = VOICES, seed: int = 1) -> list[Utterance]:
    """Sentences of GRAMMAR, each read by all voices.

    Args:
        count: of sentences.
        voices: of espeak-ng; variants stand behind a plus sign.
        seed: chooses the sentences.
    """
    sentences = list(product(*GRAMMAR))
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    texts = [" ".join(sentences[number]) for number in order]
    with closing(Espeak()) as espeak:
        return [Utterance(espeak.say(text, voice), text, voice) for voice in voices for text in texts]


def manifest(
    path: str, file: str = "file", text: str = "text", speaker: str | None = None, skip_broken: bool = False
) -> list[Utterance]:
    """The user's own recordings.

    Args:
        path: .csv with a header line, or .jsonl, with a row for each recording; its files are relative to its folder.
        file: name of the column, or key, with the recording.
        text: the same for what is said.
        speaker: the same for who says it; None where nobody knows.
        skip_broken: leave out rows and recordings that can't be read, and say how many they were.

    Raises:
        InputError: there is no such manifest, or a row or recording of it is broken.
    """
    columns = {"data.file": file, "data.text": text, **({"data.speaker": speaker} if speaker else {})}
    folder, rates = Path(path).expanduser().parent, set()

    def read(row: TableRow) -> Utterance:
        name, said, *who = (str(row.value(column, setting)) for setting, column in columns.items())
        place = f"data.path={path}, {row.place}"
        _, rate = check_sound(folder / name, place)
        rates.add(rate)
        return Utterance(folder / name, said, who[0] if who else "", place)

    utterances = sound_rows(table_rows(path), read, skip_broken)
    if others := sorted(rates - {RATE}):
        print(f"data.path={path}: recordings at {', '.join(map(str, others))} samples a second are resampled to {RATE}")
    return utterances


class Espeak:
    """The library espeak-ng, in this process, in a copy of its own: its noise goes on from one that was closed.

    Raises:
        InputError: it is not installed.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise InputError("speech needs espeakng-loader: pip install 'lightning-unitscale[speech]'") from error
        with tempfile.TemporaryDirectory() as folder:
            self.library: Any = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), folder))
        retrieval = 1
        self.rate: int = self.library.espeak_Initialize(retrieval, 0, espeakng_loader.get_data_path().encode(), 0)
        if self.rate <= 0:
            raise InputError("espeak-ng does not begin; install espeakng-loader again")
        self.chunks: list[Any] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._take)  # kept, or it would be freed
        self.library.espeak_SetSynthCallback(self._callback)

    def _take(self, samples: Any, count: int, events: Any) -> int:
        if samples and count:
            self.chunks.append(numpy.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str) -> Tensor:
        """Samples at RATE.

        Raises:
            InputError: there is no such voice.
        """
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise InputError(f"data.voices: espeak-ng has no voice {voice}")
        self.chunks.clear()
        said, utf8 = text.encode(), 1
        self.library.espeak_Synth(said, len(said) + 1, 0, 1, 0, utf8, None, None)
        self.library.espeak_Synchronize()
        return resampled(torch.from_numpy(numpy.concatenate(self.chunks)).float() / 2**15, self.rate)

    def close(self) -> None:
        """Frees what it holds."""
        self.library.espeak_Terminate()
