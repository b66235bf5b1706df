"""Weights kept in fewer bits: bfloat16, or e4m3 with one power-of-two scale for each tensor.

    kept    ŵ = cast(w · 2^k),  k = −round(log2 RMS(w))        one byte an element
    used    ŵ · 2^-k in the dtype of the activations            exact: only the cast loses anything, about 2.7 %

A weight becomes a parametrization of what is kept, so the model's own code sees a weight as before, in any module. The
arithmetic stays in the dtype of the activations, so this saves memory; it saves time only where reading weights is what
takes the time. Activations are rounded as they were in training, where the model's plan has a format for them:

    x̂ = cast(x · s) / s,  s the plan's power of two for that matmul
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_unitscale.engine.plan import Plan, plan_of
from lightning_unitscale.engine.record import rms
from lightning_unitscale.errors import InputError
from lightning_unitscale.formats import FORMATS, cast, exponent
from lightning_unitscale.options import UnitScalingError

WEIGHT_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


class _Kept(nn.Module):
    """From the kept weight to the one that is used."""

    scale: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.used = dtype, weight.dtype
        k = exponent(rms(weight), float(weight.detach().abs().max()), dtype) if dtype.itemsize == 1 else 0
        self.register_buffer("scale", torch.tensor(2.0**k, dtype=weight.dtype, device=weight.device))

    def forward(self, kept: Tensor) -> Tensor:
        return kept.to(self.used) / self.scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:  # a tuple, as one bare tensor may not change its dtype
        return (cast(weight, self.dtype, self.scale),)


def narrow_weights(model: nn.Module, format: str, plan: Plan | None = None) -> None:
    """Keep every weight of at least two dimensions in another format, in place; for inference alone.

    Args:
        model: plain (`to_plain`): factors in the forward pass would not find weights that are made on access.
        format: "bfloat16" or "fp8".
        plan: of the model before it was made plain; its formats for activations stay.

    Raises:
        InputError: there is no such format.
        UnitScalingError: the model is not plain.
    """
    if plan_of(model) is not None:
        raise UnitScalingError(f"{type(model).__name__} is unit-scaled; pass what to_plain() returns.")
    if format not in WEIGHT_FORMATS:
        raise InputError(f"weights={format} is not known; choose one of {', '.join(WEIGHT_FORMATS)}")
    if plan is not None:
        _cast_activations(model, plan)
    dtype = WEIGHT_FORMATS[format]
    uses: dict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and parameter.dtype != dtype:
                uses[parameter].append((module, name))
    for parameter, owners in uses.items():
        parameter.requires_grad_(False)
        kept = _Kept(parameter, dtype)
        for module, name in owners:
            parametrize.register_parametrization(module, name, kept, unsafe=True)
        lists: list[Any] = [module.parametrizations[name] for module, name in owners]  # type: ignore[index]
        for other in lists[1:]:  # tied weights stay one tensor
            other.original0 = lists[0].original0


def _cast_activations(model: nn.Module, plan: Plan) -> None:
    """Round what goes into each module whose weight has a cast site, with the scale of that site.

    The readout is left out: to make the model plain, a tied one's factor moves into its input.
    """
    modules = dict(model.named_modules())
    for site in plan.cast_sites:
        owner = modules.get(site.params[0].rpartition(".")[0]) if site.params else None
        if owner is None or site.role == "readout" or "x" not in site.operand_scales:
            continue
        dtype, scale = FORMATS[str(site.format)].x, site.operand_scales["x"]
        owner.register_forward_pre_hook(partial(_round_input, dtype=dtype, scale=scale))


def _round_input(module: nn.Module, args: tuple[Any, ...], dtype: torch.dtype, scale: float) -> tuple[Any, ...]:
    x, *others = args
    return (cast(x, dtype, scale).to(x.dtype) / scale if x.is_floating_point() else x, *others)


def stored_bytes(model: nn.Module) -> int:
    """Size of all parameters, tied ones once, and of the scales of narrow ones."""
    scales = {id(m): m.scale for m in model.modules() if isinstance(m, _Kept)}
    return sum(tensor.nbytes for tensor in (*model.parameters(), *scales.values()))
