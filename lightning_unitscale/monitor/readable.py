"""Numbers as people read them, the same in the terminal and in the report."""

from __future__ import annotations

from math import isfinite
from typing import Any


def readable(value: Any) -> str:
    """Whole numbers with thousands separated, others to four digits; what is no number as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (isfinite(value) and abs(value) >= 10_000):
        return f"{value:,.0f}"
    return f"{value:.4g}"
