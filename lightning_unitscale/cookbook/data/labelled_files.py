"""Examples from the user's own files: CSV or JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_unitscale.cookbook.data.examples import Labelled, Pair
from lightning_unitscale.errors import InputError


def labelled_file(path: str, text: str = "text", label: str = "label") -> list[Labelled]:
    """Texts and classes; equal texts stay on one side of a split.

    Args:
        path: a .csv file with a header line, or a .jsonl file.
        text: name of the column, or key, with the text.
        label: the same for the class.

    Raises:
        InputError: no such file, another ending, or a row without one of the two.
    """
    rows = [
        Labelled(row[0], label=row[1], group=row[0])
        for row in read_table(path, {"data.text": text, "data.label": label})
    ]
    if len({row.label for row in rows}) < 2:
        raise InputError(f"data.path={path}: all {len(rows)} rows have the same label, there is nothing to learn")
    return rows


def paired_file(path: str, source: str = "source", target: str = "target") -> list[Pair]:
    """Texts and what they are to be turned into.

    Args:
        path: a .csv file with a header line, or a .jsonl file.
        source: name of the column, or key, with the input.
        target: the same for the output.

    Raises:
        InputError: no such file, another ending, or a row without one of the two.
    """
    return [Pair(*row) for row in read_table(path, {"data.source": source, "data.target": target})]


def read_table(path: str, columns: dict[str, str]) -> list[tuple[str, ...]]:
    """The values of some columns, row by row.

    Args:
        path: a .csv file with a header line, or a .jsonl file.
        columns: setting that names the column -> its name.

    Raises:
        InputError: no such file, another ending or encoding, or a row without one of the columns.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"data.path={path}: no such file (looked in {Path.cwd()})")
    readers = {".csv": _csv, ".jsonl": _json_lines}
    if file.suffix not in readers:
        raise InputError(f"data.path={path}: give a file that ends in {' or '.join(readers)}")
    rows = []
    for number, row in enumerate(readers[file.suffix](file), start=1):
        for key, column in columns.items():
            if not isinstance(row, dict) or row.get(column) in (None, ""):
                known = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
                raise InputError(f"data.path={path}: row {number} has no {column!r} ({key}); it has {known}")
        rows.append(tuple(str(row[column]) for column in columns.values()))
    if not rows:
        raise InputError(f"data.path={path}: the file has no rows")
    return rows


def _csv(file: Path) -> Iterator[Any]:
    yield from csv.DictReader(io.StringIO(_utf8(file), newline=""))


def _utf8(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise InputError(
            f"data.path={file}: line {line} is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error


def _json_lines(file: Path) -> Iterator[Any]:
    for number, line in enumerate(_utf8(file).splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"data.path={file}: line {number} is not JSON ({error})") from error
