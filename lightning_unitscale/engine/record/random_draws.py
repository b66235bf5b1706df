"""What a step's random numbers decide: whether it drew any, and the same step under others."""

from __future__ import annotations

import random

import numpy as np
import torch


def random_state() -> bytes:
    """The state of the global random number generators; equal before and after code that draws nothing."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    drawn = b"".join(state.numpy().tobytes() for state in states)
    return drawn + repr((random.getstate(), np.random.get_state())).encode()


def draw_anew(draw: int) -> None:
    """Seed the global generators, alike in all processes: branches not taken together would wait for each other."""
    random.seed(draw)
    np.random.seed(draw)
    torch.manual_seed(draw)
