"""Pictures of what models do, for the report of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        axes.imshow(picture.expand(-1, -1, 3) if picture.shape[-1] == 1 else picture[..., :3])
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
