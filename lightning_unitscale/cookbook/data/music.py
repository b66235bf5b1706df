"""Music as events, one byte each, so that a language model of bytes writes it.

    0 … 87      a note begins: pitch 21 (A0) to 108 (C8) of MIDI
    88 … 175    it ends
    176 … 207   1 to 32 sixteenths pass

The chorales of Bach that come with music21 (BSD; the music is in the public domain), and the user's own MIDI and
MusicXML files. All are transposed to C major or A minor, unless asked otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_unitscale.cookbook.data.sound_rows import sound_rows
from lightning_unitscale.errors import InputError

LOWEST, HIGHEST = 21, 108
ENDS = HIGHEST - LOWEST + 1  # the first event of this kind
PASSES = 2 * ENDS
LONGEST = 32  # sixteenths in one event
GRID = 4  # sixteenths in a quarter
ENDINGS = (".mid", ".midi", ".xml", ".mxl", ".musicxml")


class Note(NamedTuple):
    """Begin and end in sixteenths, and the pitch of MIDI."""

    begin: int
    end: int
    pitch: int


def chorales(count: int | None = None, voices: int = 4) -> dict[str, bytes]:
    """Name -> events.

    Args:
        count: so many, in the order of their numbers; None for all 300 or so.
        voices: those with another number of parts are left out.

    Raises:
        InputError: music21 is not installed.
    """
    music21 = _music21()
    found: dict[str, bytes] = {}
    for file in sorted(music21.corpus.getComposer("bach"), key=str):
        if "bwv" not in file.name or (count is not None and len(found) >= count):
            continue
        score = music21.converter.parse(file)
        if len(score.parts) == voices:
            found[file.stem] = events_of(_notes(score, one_key=True))
    return found


def music_folder(path: str, one_key: bool = True, skip_broken: bool = False) -> dict[str, bytes]:
    """The user's own music: file -> events.

    Args:
        path: a folder, whose MIDI and MusicXML files are read, those in folders below it too.
        one_key: transpose all to C major or A minor.
        skip_broken: leave out files that can't be read, and say how many they were.

    Raises:
        InputError: there is no such folder, or a file can't be read.
    """
    folder, music21 = Path(path).expanduser(), _music21()
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
    if not files:
        raise InputError(f"data.path={path}: no folder with files that end in {', '.join(ENDINGS)}")

    def read(file: Path) -> tuple[str, bytes]:
        try:
            notes = _notes(music21.converter.parse(file), one_key)
        except Exception as error:  # music21 raises many kinds
            raise InputError(f"data.path={path}: {file} is no music that can be read ({error})") from error
        if not notes:
            raise InputError(f"data.path={path}: {file} has no notes")
        return str(file.relative_to(folder)), events_of(notes)

    return dict(sound_rows(files, read, skip_broken))


def _notes(score: Any, one_key: bool) -> list[Note]:
    shift = 0
    if one_key:
        key = score.analyze("key")
        shift = (3 if key.mode == "major" else 0) - (key.tonic.pitchClass - 9) % 12  # to C, or to A
        shift = (shift + 6) % 12 - 6
    notes = []
    for one in score.flatten().stripTies().notes:
        begin = round(float(one.offset) * GRID)
        end = max(begin + 1, round(float(one.offset + one.duration.quarterLength) * GRID))
        pitches = [pitch.midi + shift for pitch in one.pitches]
        notes += [Note(begin, end, pitch) for pitch in pitches if LOWEST <= pitch <= HIGHEST]
    return _one_at_a_time(notes)


def _one_at_a_time(notes: Iterable[Note]) -> list[Note]:
    """Where voices meet in a pitch, the note that sounds ends when the next one begins."""
    kept: list[Note] = []
    last: dict[int, int] = {}  # pitch -> place in `kept`
    for note in sorted(set(notes)):
        before = last.get(note.pitch)
        if before is not None and kept[before].end > note.begin:
            if kept[before].begin == note.begin:
                kept[before] = note  # the longer of two
                continue
            kept[before] = kept[before]._replace(end=note.begin)
        last[note.pitch] = len(kept)
        kept.append(note)
    return kept


def events_of(notes: Iterable[Note]) -> bytes:
    """In the order of time; what ends at a moment stands before what begins there, both from low to high."""
    moments: dict[int, list[int]] = {}
    for note in notes:
        moments.setdefault(note.begin, []).append(note.pitch - LOWEST)
        moments.setdefault(note.end, []).append(note.pitch - LOWEST + ENDS)
    events, now = [], 0
    for moment in sorted(moments):
        while moment > now:
            step = min(moment - now, LONGEST)
            events.append(PASSES + step - 1)
            now += step
        events += sorted(moments[moment], key=lambda event: (event < ENDS, event))
    return bytes(events)


def notes_of(events: Sequence[int]) -> list[Note]:
    """What events say, also where they are a model's: ends of what did not begin and unknown events are passed over."""
    notes: list[Note] = []
    sounding: dict[int, int] = {}
    now = 0
    for event in events:
        if event < ENDS:
            sounding.setdefault(event + LOWEST, now)
        elif event < PASSES:
            begin = sounding.pop(event - ENDS + LOWEST, now)
            notes += [Note(begin, now, event - ENDS + LOWEST)] if begin < now else []
        elif event < PASSES + LONGEST:
            now += event - PASSES + 1
    return sorted([*notes, *(Note(begin, now, pitch) for pitch, begin in sounding.items() if begin < now)])


def write_midi(notes: Iterable[Note], file: Path) -> Path:
    """One part, at music21's own tempo of 120 quarters a minute."""
    music21 = _music21()
    part = music21.stream.Part()
    for note in notes:
        length = (note.end - note.begin) / GRID
        part.insert(note.begin / GRID, music21.note.Note(note.pitch, quarterLength=length))
    part.write("midi", fp=str(file))
    return file


def _music21() -> Any:
    try:
        import music21
    except ImportError as error:
        raise InputError("music needs music21: pip install 'lightning-unitscale[music]'") from error
    return music21
