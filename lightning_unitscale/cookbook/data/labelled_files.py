"""Examples from the user's own tables: CSV, JSON lines or Parquet."""

from __future__ import annotations

from lightning_unitscale.cookbook.data.examples import Labelled, Pair
from lightning_unitscale.cookbook.data.sound_rows import sound_rows
from lightning_unitscale.cookbook.data.table_files import TableRow, table_rows
from lightning_unitscale.errors import InputError


def labelled_file(path: str, text: str = "text", label: str = "label", skip_broken: bool = False) -> list[Labelled]:
    """Texts and classes; equal texts stay on one side of a split.

    Args:
        path: see `table_rows`.
        text: name of the column, or key, with the text.
        label: the same for the class.
        skip_broken: leave out rows that can't be read or have nothing in a column, and say how many they were.

    Raises:
        InputError: no such file, another ending or encoding, or a row without one of the two.
    """
    rows = [
        Labelled(row[0], label=row[1], group=row[0])
        for row in read_table(path, {"data.text": text, "data.label": label}, skip_broken)
    ]
    if len({row.label for row in rows}) < 2:
        raise InputError(f"data.path={path}: all {len(rows)} rows have the same label, there is nothing to learn")
    return rows


def paired_file(path: str, source: str = "source", target: str = "target", skip_broken: bool = False) -> list[Pair]:
    """Texts and what they are to be turned into.

    Args:
        path: see `table_rows`.
        source: name of the column, or key, with the input.
        target: the same for the output.
        skip_broken: as for `labelled_file`.

    Raises:
        InputError: as for `labelled_file`.
    """
    return [Pair(*row) for row in read_table(path, {"data.source": source, "data.target": target}, skip_broken)]


def read_table(path: str, columns: dict[str, str], skip_broken: bool = False) -> list[tuple[str, ...]]:
    """The values of some columns, row by row, as texts.

    Args:
        path: see `table_rows`.
        columns: setting that names the column -> its name.
        skip_broken: as for `labelled_file`.

    Raises:
        InputError: as for `labelled_file`.
    """

    def read(row: TableRow) -> tuple[str, ...]:
        return tuple(str(row.value(column, setting)) for setting, column in columns.items())

    return sound_rows(table_rows(path), read, skip_broken)
