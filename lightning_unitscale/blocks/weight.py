"""θ_scaled = θ / α, α = max|θ| / √d: a weight divided by its own scale, or by a fixed one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import handle_torch_function, has_torch_function_unary

from lightning_unitscale.blocks.divisor import Scale, check_scale, divisor
from lightning_unitscale.errors import UnitScalingError


def scale_weight(weight: Tensor, scale: Scale = None) -> Tensor:
    """θ / α, differentiable, α too.

    Args:
        weight: of floating point, any shape.
        scale: α; None: max|θ| / √d of the weight itself, d its number of elements, or 1 where that is 0.

    Raises:
        UnitScalingError: the scale is not above 0, or the weight has no elements.
    """
    if has_torch_function_unary(weight):  # function modes see one call, by its own name
        return handle_torch_function(scale_weight, (weight,), weight, scale)
    return weight / divisor(weight, scale, None, "scale_weight")


class WeightScaling(nn.Module):
    """A module whose weight is stored divided by α: once, when the block is made.

    The module runs on θ / α, which is another function; with `keep_function` on α · (θ / α), its own one. What an
    optimizer steps is θ / α in either case.

    Args:
        module: what is run; its parameter is divided in place and stays the same object.
        scale: α; None: max|θ| / √d of the parameter as it is now, d its number of elements. One that is all zero is
            left alone: its α is 1.
        name: of the parameter in `module`; dots lead into its parts.
        keep_function: carry α along in the forward pass.

    Raises:
        UnitScalingError: there is no such parameter, it has no elements or no values yet, or the scale is not above 0.
    """

    scale: Tensor  # α, 0-dim; a buffer, so that a state dict has it

    def __init__(
        self, module: nn.Module, scale: Scale = None, name: str = "weight", keep_function: bool = False
    ) -> None:
        super().__init__()
        check_scale(scale, "WeightScaling")
        parameter = dict(module.named_parameters()).get(name)
        if parameter is None:
            known = ", ".join(known for known, _ in module.named_parameters()) or "none"
            raise UnitScalingError(f"WeightScaling: {type(module).__name__} has no parameter {name!r}; it has {known}.")
        if parameter.is_meta or nn.parameter.is_lazy(parameter):
            raise UnitScalingError(
                f"WeightScaling: {name} of {type(module).__name__} has no values yet; make it on a real device first."
            )
        self.module, self.name, self.keep_function = module, name, keep_function
        with torch.no_grad():
            self.register_buffer("scale", parameter.new_ones(()) * divisor(parameter, scale, None, "WeightScaling"))
            parameter.div_(self.scale)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives on θ / α, or on α · (θ / α)."""
        if not self.keep_function:
            return self.module(*args, **kwargs)
        weight = self.scale * self.module.get_parameter(self.name)
        return functional_call(self.module, {self.name: weight}, args, kwargs)

    def extra_repr(self) -> str:
        """As it was made."""
        return f"name={self.name!r}, keep_function={self.keep_function}"
