"""Tables as recipes print them, and keep them beside their results."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from shutil import get_terminal_size

from rich.console import Console, RenderableType
from rich.table import Table


def new_table(title: str, texts: Iterable[str], numbers: Iterable[str]) -> Table:
    """A table without rows: columns of text, then columns of numbers, which stand on the right."""
    table = Table(title=title)
    for name in texts:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def terminal_width() -> int | None:
    """How many columns a person sees; None where what is printed goes to a file or another program."""
    return get_terminal_size().columns if sys.stdout.isatty() else None


def print_and_keep(file: Path, *parts: RenderableType, width: int = 100) -> None:
    """Prints tables and lines, and writes them into a text file with so many columns."""
    with file.open("w") as stream:
        for console in (Console(), Console(file=stream, width=width)):
            for part in parts:
                console.print(part, markup=False)
