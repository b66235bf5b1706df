"""Casts in the forward pass: one `CastSite` for each weight and function whose operands the plan casts.

A site's scales are measured while it casts nothing (see `calibrate`); from then on it casts. A weight is cast once as
long as it does not change: through accumulated batches, and wherever one layer is called many times.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_unitscale.engine.plan import Site
from lightning_unitscale.formats import FORMATS, OPERANDS, cast
from lightning_unitscale.ops.cast_product import Scales, cast_product
from lightning_unitscale.ops.products import Products

Use = tuple[str, str]  # a parameter's key and the short name of the function that uses it


@dataclass
class CastSite:
    """The operand scales of one use of a weight; callable as the product of its operands.

    Attributes:
        format: a name in `FORMATS`.
        factor: unit scaling's own for this use.
        scales: None as long as they have not been measured, and nothing is cast.
    """

    format: str
    factor: float = 1.0
    scales: Scales | None = None
    _weight: _CachedCast | None = field(default=None, repr=False)

    def set_scales(self, scales: dict[str, float]) -> None:
        """Take these powers of two, by operand; in place, so that compiled code sees them without being recompiled."""
        x, weight, gradient = (scales[operand] for operand in OPERANDS)
        numbers = (x, weight, gradient, self.factor / x, 1 / x, 1 / weight, self.factor / gradient)
        self._weight = None
        if self.scales is None:
            self.scales = Scales(*(torch.tensor(number, dtype=torch.float32) for number in numbers))
        else:
            for tensor, number in zip(self.scales, numbers, strict=True):
                tensor.fill_(number)

    def __call__(self, x: Tensor, weight: Tensor, products: Products) -> Tensor:
        """The product of the cast operands times the factor; see `ops.cast_product`."""
        assert self.scales is not None
        if self.scales.x.device != x.device:
            self.scales = Scales(*(scale.to(x.device) for scale in self.scales))
        return cast_product(x, weight, products, FORMATS[self.format], self.scales, self._narrow(weight))

    def _narrow(self, weight: Tensor) -> Tensor | None:
        """The cast weight, if it is worth keeping: while training in eager mode."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not weight.requires_grad:
            return None
        if self._weight is None or not self._weight.holds(weight):
            assert self.scales is not None
            with torch.no_grad():
                narrow = cast(weight, FORMATS[self.format].weight, self.scales.weight)
            self._weight = _CachedCast.of(weight, narrow)
        return self._weight.narrow

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weight": None}


@dataclass
class _CachedCast:
    """A cast weight, and what it was cast from: storage, layout and version, which every in-place change counts up."""

    narrow: Tensor
    version: int
    place: tuple[Any, ...]

    @classmethod
    def of(cls, weight: Tensor, narrow: Tensor) -> _CachedCast:
        return cls(narrow, weight._version, _place(weight))

    def holds(self, weight: Tensor) -> bool:
        return self.version == weight._version and self.place == _place(weight)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def cast_sites(sites: list[Site]) -> dict[Use, CastSite]:
    """The cast sites of a plan, with the scales that it has."""
    found: dict[Use, CastSite] = {}
    for site in sites:
        if site.format is not None:
            use = site.params[0], site.op
            found[use] = CastSite(site.format, site.factors.get(site.params[0], 1.0))
            if site.operand_scales:
                found[use].set_scales(site.operand_scales)
    return found
