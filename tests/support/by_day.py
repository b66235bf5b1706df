"""Which parameters of a test run by day, which in the nightly run, and which by hand alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

BY_HAND = (pytest.mark.slow, pytest.mark.by_hand)


def by_day(values: Iterable[Any], day: Collection[Any]) -> list[Any]:
    """All values as parameters, those that are not among `day` marked slow."""
    return [pytest.param(value, marks=[] if value in day else [pytest.mark.slow]) for value in values]


def by_night(values: Iterable[Any], night: Collection[Any]) -> list[Any]:
    """All values as parameters of a slow test, those that are not among `night` left to a run by hand.

    Several arguments are a tuple.
    """
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=() if value in night else BY_HAND)
        for value in values
    ]
