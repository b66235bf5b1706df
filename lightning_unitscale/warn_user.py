"""Warnings that show the user's own line: the call of `fit`, `unit_scale`, `step`, wherever the cause was noticed."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

BETWEEN = ("lightning_unitscale", "torch", "pytorch_lightning", "lightning", "contextlib")  # us, and who calls us


def warn_user(message: str) -> None:
    """Warn at the innermost line that belongs to none of the packages between.

    As `warnings.warn(skip_file_prefixes=…)` does from Python 3.12 on.
    """
    level, frame = 2, sys._getframe(1)
    while _is_between(frame) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_between(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN
