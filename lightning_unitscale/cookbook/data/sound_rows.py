"""Rows of the user's own data, each looked at before training: what is broken is named, or left out and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from lightning_unitscale.errors import InputError

Row = TypeVar("Row")
Example = TypeVar("Example")


def sound_rows(rows: Iterable[Row], read: Callable[[Row], Example], skip_broken: bool | None) -> list[Example]:
    """The examples that rows make.

    Args:
        rows: of any kind.
        read: makes an example of a row; raises InputError, naming file and row, where it can't.
        skip_broken: leave such rows out and print how many they were, with the first one's reason; None for data that
            has no such setting.

    Raises:
        InputError: a row is broken and `skip_broken` is off, or none is sound.
    """
    examples, reasons = [], []
    for row in rows:
        try:
            examples.append(read(row))
        except InputError as error:
            if skip_broken is None:
                raise
            if not skip_broken:
                raise InputError(f"{error}; data.skip_broken=true leaves such rows out") from error
            reasons.append(str(error))
    if reasons and examples:
        print(
            f"left out {len(reasons)} of {len(reasons) + len(examples)} rows that are broken; the first: {reasons[0]}"
        )
    if not examples:
        raise InputError(reasons[0] if reasons else "the data has no rows")
    return examples
