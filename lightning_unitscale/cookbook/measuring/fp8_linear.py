"""Linear layers with FP8 operands: what `UnitScaling(format="fp8")` runs, and torchao's."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unitscale.formats import FORMATS
from lightning_unitscale.ops.cast_product import CastProduct, Scales
from lightning_unitscale.ops.products import MatrixProducts


class StaticLinear(nn.Linear):
    """What a linear layer does under `UnitScaling(format="fp8")`: each operand times a constant, then cast."""

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(size, size, bias=False, **options)
        numbers = torch.ones(len(Scales._fields), dtype=torch.float32, device=self.weight.device)
        self.scales = Scales(*numbers.unbind())

    def forward(self, x: Tensor) -> Tensor:
        """x: (tokens, in); result: (tokens, out)."""
        y: Tensor = CastProduct.apply(  # type: ignore[no-untyped-call]  # torch's
            x, self.weight, None, MatrixProducts(), FORMATS["fp8"], x.dtype, *self.scales
        )
        return y


def with_torchao(module: nn.Module, recipe: str, emulate: bool) -> nn.Module:
    """torchao's float8 training of every linear layer in the module.

    Args:
        module: changed in place, and wrapped: a linear layer that is the root itself would not be converted.
        recipe: "tensorwise" or "rowwise", what one dynamic scale is for.
        emulate: cast, and multiply upcast operands; tensorwise whatever the recipe.

    Raises:
        ModuleNotFoundError: torchao is not installed.
    """
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=True) if emulate else Float8LinearConfig.from_recipe_name(recipe)
    converted: nn.Module = convert_to_float8_training(nn.Sequential(module), config=config)
    return converted
