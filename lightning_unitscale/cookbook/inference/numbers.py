"""The numbers that a run of `unitscale inference` ends with."""

from __future__ import annotations

import resource
import sys

import torch


def print_numbers(**numbers: str) -> None:
    """The numbers of a run, and its peak memory."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    for name, value in {**numbers, "peak memory": f"{peak:,.0f} MiB"}.items():
        print(f"{name.replace('_', ' '):20} {value}")
