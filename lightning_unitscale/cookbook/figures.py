"""Pictures of what models do, for the report of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

PICTURES = 8  # of one grid
COLUMNS = 4


def picture_grid(pixels: Tensor, file: Path, draw: Callable[[Axes, int], None]) -> Path:
    """Writes the first pictures of a batch beside each other.

    Args:
        pixels: [batch, channels, height, width] with values in -1 … 1.
        file: .png
        draw: adds to the axes of the picture with a number.
    """
    count = min(len(pixels), PICTURES)
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.5 * columns, 2.5 * rows), layout="constrained")
    for number in range(count):
        axes = figure.add_subplot(rows, columns, number + 1)
        picture = pixels[number].float().cpu().clamp(-1, 1).permute(1, 2, 0) / 2 + 0.5
        axes.imshow((picture.expand(-1, -1, 3) if picture.shape[-1] == 1 else picture[..., :3]).numpy())
        axes.axis("off")
        draw(axes, number)
    figure.savefig(file, dpi=110)
    return file


def piano_roll(notes: Sequence[tuple[int, int, int]], file: Path, heard: int) -> Path:
    """Writes notes as bars over time.

    Args:
        notes: begin, end, pitch.
        file: .png
        heard: where what was given ends, and what is new begins.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.add_subplot()
    for begin, end, pitch in notes:
        colour = "tab:gray" if begin < heard else "tab:blue"
        axes.broken_barh([(begin, end - begin)], (pitch - 0.4, 0.8), facecolor=colour)
    axes.axvline(heard, color="black", linewidth=0.5)
    axes.set(xlabel="sixteenths (grey: given, blue: the model's)", ylabel="pitch (MIDI)")
    figure.savefig(file, dpi=110)
    return file


def spectrograms(rows: Sequence[tuple[str, Mapping[str, Tensor]]], file: Path) -> Path:
    """Writes log-mel spectrograms beside each other, with one scale of brightness for a row.

    Args:
        rows: a title, and [frames, bins] by name.
        file: .png
    """
    columns = max(len(each) for _, each in rows)
    figure = Figure(figsize=(4.5 * columns, 2.2 * len(rows)), layout="constrained")
    for line, (title, each) in enumerate(rows):
        low = min(float(mel.min()) for mel in each.values())
        high = max(float(mel.max()) for mel in each.values())
        for column, (name, mel) in enumerate(each.items(), start=1):
            axes = figure.add_subplot(len(rows), columns, line * columns + column)
            axes.imshow(
                mel.float().T.numpy(), origin="lower", aspect="auto", vmin=low, vmax=high, interpolation="nearest"
            )
            axes.set_title(f"{title} ({name})", fontsize=8)
            axes.set(xlabel="frames of 10 ms", ylabel="mel bins")
    figure.savefig(file, dpi=110)
    return file


def confusion_matrix(counts: Tensor, names: Sequence[str], file: Path) -> Path:
    """Writes how often each class was taken for each.

    Args:
        counts: [true classes, answers].
        names: of the classes.
        file: .png
    """
    side = min(3 + 0.35 * len(names), 14)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    places = range(len(names))
    axes.set(xlabel="answer", ylabel="true class", xticks=places, yticks=places)
    axes.set_xticklabels(names, rotation=90)
    axes.set_yticklabels(names)
    for row, column in counts.nonzero().tolist():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=colour, fontsize=7)
    figure.savefig(file, dpi=110)
    return file
