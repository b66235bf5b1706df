"""Which parameters of a test run by day; the others are left to the nightly run."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def by_day(values: Iterable[Any], day: Collection[Any]) -> list[Any]:
    """All values as parameters, those that are not among `day` marked slow."""
    return [pytest.param(value, marks=[] if value in day else [pytest.mark.slow]) for value in values]
