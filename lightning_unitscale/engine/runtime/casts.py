"""Casts in the forward pass: one `CastSite` for each use of a weight, or attention product, whose operands are cast.

The plan's site owns the scales; they are measured while it casts nothing (see `calibration`), and from then on it
casts. A parameter is cast once
as long as it does not change: through accumulated batches, and wherever one layer is called many times. A change is
known by

    its version           operations in place count it up
    an optimizer's step   as many write to `parameter.data`, or from kernels of their own, which counts nothing
    its gradient gone     after a backward pass: so look loops that write to `parameter.data` without an optimizer

Weights computed from parameters are cast each time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.formats import FORMATS, OPERANDS, Format
from lightning_unitscale.ops import FunctionCall, Matmul
from lightning_unitscale.ops.cast_for_products import CastOperand, cast_for_products
from lightning_unitscale.ops.cast_product import Scales, cast_product
from lightning_unitscale.ops.products import Products
from lightning_unitscale.ops.round_trip import Rounded, RoundedGradient


class CastSite(ABC):
    """The casts of one use.

    Attributes:
        site: what the plan says of it: its format, factor and operand scales.
        used: whether it has cast anything yet, other than in compiled code.
        scales: 0-dim float32 tensors by name, made of the site's operand scales; None, and nothing is cast, as long as
            it has none.
    """

    def __init__(self, site: Site) -> None:
        self.site, self.used = site, False
        self.scales: dict[str, Tensor] | None = None
        self.update()

    @property
    def format(self) -> Format:
        """What the operands are cast to."""
        return FORMATS[self.site.format or ""]

    def update(self) -> None:
        """Take the site's operand scales; in place, so that compiled code sees them without being recompiled."""
        if not self.site.operand_scales:
            return
        numbers = self._numbers(self.site.operand_scales)
        if self.scales is None or self.scales.keys() != numbers.keys():
            self.scales = numbers
        else:
            for name, number in numbers.items():
                self.scales[name].copy_(number)

    @abstractmethod
    def _numbers(self, operand_scales: dict[str, float]) -> dict[str, Tensor]:
        """What `scales` holds, by name; float32, new tensors."""

    def _scales_on(self, device: torch.device) -> dict[str, Tensor]:
        assert self.scales is not None
        if not torch.compiler.is_compiling():
            self.used = True
        if next(iter(self.scales.values())).device != device:
            self.scales = {name: scale.to(device) for name, scale in self.scales.items()}
        return self.scales


class WeightCast(CastSite):
    """One use of a weight; callable as the product of its operands, times the site's factor."""

    _weight: _CachedCast | None = None

    def update(self) -> None:
        """Take the site's operand scales; see the base class."""
        self._weight = None
        super().update()

    def _numbers(self, operand_scales: dict[str, float]) -> dict[str, Tensor]:
        x, weight, gradient = (torch.tensor(operand_scales[operand], dtype=torch.float32) for operand in OPERANDS)
        factor = self.site.factors.get(self.site.params[0], 1.0)
        if not self.site.row_exponents:
            scales = Scales(x, weight, gradient, factor / x, 1 / x, 1 / weight, factor / gradient)
        else:
            rows = {name: _powers_of_two(k) for name, k in self.site.row_exponents.items()}
            weight, x_columns = rows["weight rows"].t(), rows["x columns"]
            of_weight, of_gradient = rows["weight columns"], rows["gradient columns"]
            scales = Scales(
                *(x, weight, gradient, factor / x, 1 / x_columns, 1 / weight, factor / gradient),
                *(x_columns, of_weight, of_gradient, 1 / of_weight, factor / of_gradient),
            )
        return {name: scale for name, scale in scales._asdict().items() if scale is not None}

    def __call__(self, x: Tensor, weight: Tensor, products: Products) -> Tensor:
        """The product of the cast operands times the factor; see `ops.cast_product`."""
        scales = Scales(**self._scales_on(x.device))
        kept = self._kept(weight, products, backward=x.requires_grad)
        y = cast_product(x, weight, products, self.format, scales, None if kept is None else kept.narrow)
        if kept is not None and y.requires_grad and not kept.spent:
            y.register_hook(kept.spend)
        return y

    def _kept(self, weight: Tensor, products: Products, backward: bool) -> _CachedCast | None:
        """The cast weight, if it is worth keeping: of a parameter or a view of one, while training in eager mode.

        Args:
            backward: whether the gradient of x will be asked for.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _leaf(weight).is_leaf:
            return None
        if _is_captured(weight):  # the graph has to cast whatever the weight is at each replay
            return None
        if dist.is_initialized() and FSDPModule.__subclasses__():  # gathers new values into memory, counting no version
            return None
        if self._weight is None or not self._weight.holds(weight, backward):
            assert self.scales is not None
            with torch.no_grad():
                cast = cast_for_products(
                    weight, "weight", self.format, Scales(**self.scales).of("weight"), products, backward=backward
                )
            self._weight = _CachedCast(cast, _state(weight), backward)
        return self._weight

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weight": None}


class AttentionCast(CastSite):
    """One of attention's own products, of which no operand is a weight.

    torch has no attention in FP8 and no batched FP8 product with one scale a tensor: the operands are cast and upcast
    again, then the model's own function runs. The numbers are those of a product in the format, at no gain in speed.
    What happens inside one function (the probabilities inside `F.scaled_dot_product_attention`) stays as it is.
    """

    def _numbers(self, operand_scales: dict[str, float]) -> dict[str, Tensor]:
        return {operand: torch.tensor(scale, dtype=torch.float32) for operand, scale in operand_scales.items()}

    def rounded(self, op: Matmul, call: FunctionCall) -> FunctionCall:
        """The call with its operands rounded to the format."""
        operands = op.multiplicands(call)
        scales = self._scales_on(next(iter(operands.values())).device)
        rounded = [
            (operand, Rounded.apply(operand, self.format.numbers(label), scales[label]))  # type: ignore[no-untyped-call]  # torch has no types here
            for label, operand in operands.items()
        ]
        return call.with_each(lambda argument: next((new for old, new in rounded if old is argument), argument))

    def rounded_gradient(self, result: Tensor) -> Tensor:
        """The result of the call; the gradient that comes back to it is rounded."""
        scale = self._scales_on(result.device)["gradient"]
        y: Tensor = RoundedGradient.apply(result, self.format.gradient, scale)  # type: ignore[no-untyped-call]  # torch has no types here
        return y


@dataclass
class _CachedCast:
    """A cast weight.

    Attributes:
        source: what it was cast from, see `_state`.
        backward: it serves the backward pass too.
        spent: a backward pass has come back to it.
    """

    narrow: CastOperand
    source: tuple[Any, ...]
    backward: bool
    spent: bool = False

    def spend(self, gradient: Tensor) -> None:
        self.spent = True

    def holds(self, weight: Tensor, backward: bool) -> bool:
        """Whether the weight still is what was cast, for what it is needed for now."""
        if backward > self.backward:
            return False
        leaf = _leaf(weight)
        if self.spent and leaf.requires_grad and leaf.grad is None:
            return False
        return self.source == _state(weight)


def _is_captured(weight: Tensor) -> bool:
    """Whether what is done to the weight now goes into a CUDA graph."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _leaf(weight: Tensor) -> Tensor:
    """The tensor that the weight is a view of."""
    return weight if weight._base is None else weight._base


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


def _powers_of_two(exponents: list[int]) -> Tensor:
    """(1, n), float32."""
    return torch.ldexp(torch.ones(1, len(exponents), dtype=torch.float32), torch.tensor(exponents))


def cast_sites(sites: list[Site]) -> dict[UseId, CastSite]:
    """The casts that a plan's sites ask for."""
    return {
        site.use: WeightCast(site) if site.params else AttentionCast(site) for site in sites if site.format is not None
    }
