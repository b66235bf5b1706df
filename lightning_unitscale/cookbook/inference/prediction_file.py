"""Predictions of any `predict_step` in a file, a row for each input, such that an interrupted run goes on.

Rows are appended to a JSONL file batch by batch, in order, so how many whole lines it has is how far the run came. A
Parquet file is made of the JSONL file at the end; until then the rows lie beside it in `<name>.partial.jsonl`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_unitscale.errors import InputError
from lightning_unitscale.near_names import not_found

KINDS = (".jsonl", ".parquet")


def read_rows(path: str, column: str) -> list[str]:
    """One text for each row of a data set.

    Args:
        path: .jsonl, .csv, .parquet (its column `column`), or any other file, whose lines are the rows.

    Raises:
        InputError: there is no such file, it is no data set, or a row has no text in that column.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"rows={path}: {not_found(file)}")
    try:
        if file.suffix == ".jsonl":
            rows: Sequence[Any] = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        elif file.suffix == ".csv":
            with file.open(newline="") as lines:
                rows = list(csv.DictReader(lines))
        elif file.suffix == ".parquet":
            rows = _parquet().read_table(file).to_pylist()
        else:
            rows = [{column: line} for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"rows={path} cannot be read: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not isinstance(row.get(column), str):
            names = ", ".join(map(str, row)) if isinstance(row, Mapping) else "none"
            raise InputError(f"rows={path}: row {number} has no text in column {column!r}; its columns are {names}")
    if not rows:
        raise InputError(f"rows={path} has no rows")
    return [row[column] for row in rows]


def rows_done(output: Path) -> int:
    """How many rows earlier runs have written to `output`; a last line cut short by a crash is taken away.

    Raises:
        InputError: the output is of an unknown kind, finished already, not ours, or cannot be written.
    """
    if output.suffix not in KINDS:
        raise InputError(f"output={output} must end in {' or '.join(KINDS)}")
    if output.suffix == ".parquet":
        _parquet()
        if output.exists():
            raise InputError(f"output={output} exists, and Parquet files are not continued; give another name")
    rows = _rows_file(output)
    try:
        rows.parent.mkdir(parents=True, exist_ok=True)
        with rows.open("ab+") as file:
            file.seek(0)
            whole = 0
            done = 0
            for line in file:
                if not _is_row(line, done):
                    if line.endswith(b"\n"):
                        raise InputError(
                            f"output={rows} exists and line {done + 1} is no prediction; give another name"
                        )
                    break
                whole, done = whole + len(line), done + 1
            file.truncate(whole)
    except OSError as error:
        raise InputError(f"output={output} cannot be written: {error.strerror}") from error
    return done


def finish(output: Path) -> None:
    """Turn the rows into the file that was asked for."""
    rows = _rows_file(output)
    if rows != output:
        import pyarrow

        table = pyarrow.Table.from_pylist([json.loads(line) for line in rows.read_text().splitlines()])
        _parquet().write_table(table, output)
        rows.unlink()


class PredictionWriter(BasePredictionWriter):
    """Appends what `predict_step` returns to a file, as each batch is done.

    Args:
        output: .jsonl or .parquet; for the latter call `finish(output)` at the end.
        start: number of the first row (`rows_done(output)`); the loader begins there.
        inputs: what each row, counted from 0, is the answer to: a text, or an example that has one. Other rows are
            known by their number.

    A step returns a list or tensor with one entry for each row, or a dict of those. An entry that is no dict stands
    under "prediction".
    """

    def __init__(self, output: str | Path, start: int = 0, inputs: Sequence[Any] = ()) -> None:
        super().__init__(write_interval="batch")
        self.inputs = inputs
        self.rows = _rows_file(Path(output))
        self.next = start

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """
        Raises:
            InputError: there is more than one process, whose rows would be out of order.
        """
        super().setup(trainer, pl_module, stage)
        if trainer.world_size > 1:
            raise InputError("predictions are written in order by one process; use trainer.devices=1")

    def write_on_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: Any, *_: Any) -> None:
        """One line a row; on the disk before the next batch begins."""
        with self.rows.open("a") as file:
            for row in _split(prediction):
                entry = row if isinstance(row, Mapping) else {"prediction": row}
                file.write(json.dumps({"row": self.next, **self._input(), **entry}) + "\n")
                self.next += 1

    def _input(self) -> dict[str, str]:
        example = self.inputs[self.next] if self.next < len(self.inputs) else None
        text = example if isinstance(example, str) else getattr(example, "text", None)
        return {"input": text} if isinstance(text, str) else {}


def _split(prediction: Any) -> list[Any]:
    """A batch's prediction as one entry a row, of plain types."""
    if isinstance(prediction, Mapping):
        columns = {name: _split(values) for name, values in prediction.items()}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if isinstance(prediction, Tensor):
        values: list[Any] = (
            prediction.detach().to(dtype=torch.float32 if prediction.is_floating_point() else None).tolist()
        )
        return values
    return list(prediction)


def _rows_file(output: Path) -> Path:
    return output if output.suffix == ".jsonl" else output.with_suffix(".partial.jsonl")


def _is_row(line: bytes, number: int) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n") and isinstance(row, dict) and row.get("row") == number


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet files need the `pyarrow` package: pip install pyarrow; or use .jsonl") from error
    return pyarrow.parquet
