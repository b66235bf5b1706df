"""Analytic constants of activations: √E[f(z)²] for z ~ N(0, 1), by the trapezoidal rule."""

from __future__ import annotations

from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor

from lightning_unitscale.engine.record.trace import Call, Value

_GRID = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
_DENSITY = torch.exp(-0.5 * _GRID**2) / sqrt(2 * pi)


def gaussian_rms(function: Any, scale: float = 1.0) -> float:
    """√E[f(scale · z)²] for z ~ N(0, 1) of an elementwise function."""
    with torch.no_grad():
        y: Tensor = function(scale * _GRID)
    return sqrt(float(torch.trapezoid(_DENSITY * y.double() ** 2, _GRID)))


def call_rms(call: Call, scale: float = 1.0) -> float:
    """The same of the function that a recorded call applies, with the call's own settings."""
    if call.name == "glu":  # a · σ(b) with independent a and b
        return gaussian_rms(torch.sigmoid)

    def run(z: Tensor) -> Tensor:
        result: Tensor = call.with_each(lambda argument: z if isinstance(argument, Value) else argument).run()
        return result

    return gaussian_rms(run, scale)
