"""Factors that differ from block to block, as compiled code has them.

A float is a part of compiled code: a block whose residual addition has another one than the block before is compiled
anew, and run eagerly once torch's limit of recompilations is reached. The value of a tensor is none. So where modules
that are alike but for the numbers in their names have different factors in one place, compiled code takes them from
0-dim tensors. Elsewhere a float is better: there is room for it inside products (`addmm(alpha=a)`).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

Place = TypeVar("Place", bound=Hashable)


class BlockConstant:
    """A factor as a tensor, on the device where it was last wanted."""

    def __init__(self, factor: float) -> None:
        self._value = torch.tensor([factor], dtype=torch.float64)  # the compiler makes a number of a 0-dim one

    def times(self, tensor: Tensor) -> Tensor:
        """The tensor multiplied by it."""
        if self._value.device != tensor.device:
            dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
            self._value = self._value.to(tensor.device, dtype)
        return tensor * self._value[0]  # a 0-dim tensor changes no other's dtype


def block_constants(factors: Mapping[Place, float], names: Mapping[Place, str]) -> dict[Place, BlockConstant]:
    """Those of the factors that another has in the same place of another block.

    Args:
        names: in which the number of the block stands, by the keys of `factors`.
    """
    alike: dict[str, list[Place]] = {}
    for place, name in names.items():
        alike.setdefault(re.sub(r"\d+", "*", name), []).append(place)
    return {
        place: BlockConstant(factors[place])
        for places in alike.values()
        if _differ(factors[place] for place in places)
        for place in places
    }


def _differ(values: Iterable[float]) -> bool:
    return len(set(values)) > 1
