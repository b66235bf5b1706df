"""Casts in the forward pass: one `CastSite` for each weight and function whose operands the plan casts.

A site's scales are measured while it casts nothing (see `calibrate`); from then on it casts. A parameter is cast once
as long as it does not change: through accumulated batches, and wherever one layer is called many times. A change is
known by the parameter's version, which operations in place count up, or by a step of any optimizer, as many write to
`parameter.data`, which counts nothing. (Code that writes to `.data` without an optimizer step before the next forward
pass is not noticed until there is one.) Weights computed from parameters are cast each time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

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
        """The cast weight, if it is worth keeping: of a parameter or a view of one, while training in eager mode."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        if not (weight if weight._base is None else weight._base).is_leaf:
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
    """A cast weight, and what it was cast from."""

    narrow: Tensor
    source: tuple[Any, ...]

    @classmethod
    def of(cls, weight: Tensor, narrow: Tensor) -> _CachedCast:
        return cls(narrow, _state(weight))

    def holds(self, weight: Tensor) -> bool:
        return self.source == _state(weight)


def _state(weight: Tensor) -> tuple[Any, ...]:
    """What differs once a weight has changed: where it lies, its layout, its version and the steps taken."""
    return (
        *(weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, weight.device),
        *(weight._version, _count_steps()[0]),
    )


@cache
def _count_steps() -> list[int]:
    """How many steps all optimizers have taken, counted from the first call on."""
    steps = [0]

    def count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        steps[0] += 1

    register_optimizer_step_post_hook(count)
    return steps


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
