"""Linear layers with FP8 operands: what `UnitScaling(format="fp8")` runs, torchao's, and Transformer Engine's."""

from __future__ import annotations

import importlib
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
        numbers = torch.ones(
            len(Scales._fields) - len(Scales._field_defaults), dtype=torch.float32, device=self.weight.device
        )
        self.scales = Scales(*numbers.unbind())

    def forward(self, x: Tensor) -> Tensor:
        """x: (tokens, in); result: (tokens, out)."""
        y: Tensor = CastProduct.apply(  # type: ignore[no-untyped-call]  # torch has no types here
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


class InTransformerEngine(nn.Module):
    """A module whose linear layers are Transformer Engine's, with its default recipe for FP8 (delayed scaling).

    Args:
        module: changed in place.

    Raises:
        ModuleNotFoundError: Transformer Engine is not installed.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.engine = importlib.import_module("transformer_engine.pytorch")
        self.module = nn.Sequential(module)  # a linear layer that is the root itself is replaced too
        for parent in list(self.module.modules()):
            for name, layer in parent.named_children():
                if isinstance(layer, nn.Linear):
                    setattr(parent, name, self._replaced(layer))

    def _replaced(self, layer: nn.Linear) -> nn.Module:
        weight = layer.weight
        new: nn.Module = self.engine.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, params_dtype=weight.dtype
        ).to(weight.device)
        with torch.no_grad():
            new.load_state_dict(layer.state_dict(), strict=False)  # it has state of its own beside
        return new

    def forward(self, x: Tensor) -> Tensor:
        """As the module's own."""
        with self.engine.fp8_autocast(enabled=True):
            y: Tensor = self.module(x)
        return y
