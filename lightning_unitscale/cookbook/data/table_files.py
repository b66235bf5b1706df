"""Rows of a table (CSV, JSON lines, Parquet), each with its place in the file and what is wrong with it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_unitscale.cookbook.data.utf16 import without_utf16
from lightning_unitscale.errors import InputError
from lightning_unitscale.near_names import not_found

ENDINGS = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class TableRow:
    """One row.

    Attributes:
        file: as it was given.
        place: in words, "row 3".
        values: by column; empty where the row can't be read.
        flaw: why it can't be read; empty for a sound row.
    """

    file: str
    place: str
    values: Mapping[str, Any] = field(default_factory=dict)
    flaw: str = ""

    def value(self, column: str, setting: str) -> Any:
        """What stands in a column.

        Args:
            column: its name.
            setting: that names it, to be named in turn.

        Raises:
            InputError: the row can't be read, or has nothing there.
        """
        if self.flaw:
            raise InputError(f"data.path={self.file}: {self.flaw}")
        if self.values.get(column) in (None, ""):
            known = ", ".join(map(str, self.values)) or "no column"
            raise InputError(f"data.path={self.file}: {self.place} has no {column!r} ({setting}); it has {known}")
        return self.values[column]


def table_rows(path: str) -> list[TableRow]:
    """All rows of a table, sound or not.

    Args:
        path: a .csv file with a header line, a .jsonl file with an object a line, or a .parquet file.

    Raises:
        InputError: no such file, one with another ending, no Parquet file, or one without rows.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"data.path={path}: {not_found(file)}")
    readers = dict(zip(ENDINGS, (_csv, _json_lines, _parquet), strict=True))
    if file.suffix not in readers:
        raise InputError(f"data.path={path}: give a file that ends in {' or '.join(readers)}")
    rows = list(readers[file.suffix](file, path))
    if not rows:
        raise InputError(f"data.path={path}: the file has no rows")
    return rows


def _csv(file: Path, path: str) -> Iterator[TableRow]:
    """What is no UTF-8 is kept in surrogates, so that it is found in its row."""
    text = without_utf16(file.read_bytes()).decode("utf-8-sig", errors="surrogateescape")
    lines = csv.DictReader(io.StringIO(text, newline=""))
    if _is_foreign(lines.fieldnames or ()):
        raise InputError(f"data.path={path}: line 1 is not UTF-8; save the file as UTF-8")
    for number, values in enumerate(lines, start=1):
        foreign = _is_foreign(values.values())
        flaw = f"line {lines.line_num} is not UTF-8; save the file as UTF-8" if foreign else ""
        yield TableRow(path, f"row {number}", {} if foreign else values, flaw)


def _is_foreign(cells: Iterable[object]) -> bool:
    return any("\udc80" <= letter <= "\udcff" for letter in "".join(map(str, cells)))


def _json_lines(file: Path, path: str) -> Iterator[TableRow]:
    number = 0
    for line, content in enumerate(
        without_utf16(file.read_bytes()).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1
    ):
        if not content.strip():
            continue
        number += 1
        values, flaw = {}, ""
        try:
            values = json.loads(content.decode())
            if not isinstance(values, dict):
                values, flaw = {}, f"row {number} is no object with names, but {type(values).__name__}"
        except UnicodeDecodeError as error:
            flaw = f"line {line} is not UTF-8 ({error.reason}); save the file as UTF-8"
        except json.JSONDecodeError as error:
            flaw = f"line {line} is not JSON ({error})"
        yield TableRow(path, f"row {number}", values, flaw)


def _parquet(file: Path, path: str) -> Iterator[TableRow]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet files need the `pyarrow` package: pip install pyarrow") from error
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of the second
        raise InputError(f"data.path={path}: no Parquet file ({error})") from error
    for number, values in enumerate(rows, start=1):
        yield TableRow(path, f"row {number}", values)
