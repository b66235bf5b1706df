"""A model in float64 throughout: what it casts to float32 itself, and products that torch has in float32 alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from support.zoo import default_dtype

GROUPED = {torch._grouped_mm, F.grouped_mm}


class Float64Throughout(TorchFunctionMode):
    """Wherever float32 is asked for, float64 is given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [_wider(argument) for argument in args]
        kwargs = {name: _wider(argument) for name, argument in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        elif func in GROUPED and args[0].dtype == torch.float64:
            func = grouped_product
        return func(*args, **kwargs)


def _wider(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


def grouped_product(x: Tensor, weights: Tensor, *, offs: Tensor, **_: Any) -> Tensor:
    """Rows up to each offset by a matrix of their own."""
    starts = [0, *offs.tolist()]
    rows = [x[start:end] @ w for start, end, w in zip(starts, starts[1:], weights, strict=False)]
    return torch.cat([*rows, x.new_zeros(len(x) - starts[-1], weights.shape[-1])])


@contextmanager
def float64_throughout() -> Iterator[None]:
    """In this context models are built and run in float64, whatever they cast."""
    with default_dtype(torch.float64), Float64Throughout():
        yield
