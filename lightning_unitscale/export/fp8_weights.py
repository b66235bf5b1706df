"""Weights kept in fewer bits: bfloat16, or e4m3 with one power-of-two scale for each tensor.

    kept    ŵ = cast(w · 2^k),  k = −round(log2 RMS(w))        one byte an element
    used    ŵ · 2^-k in the dtype of the activations            exact: only the cast loses anything, about 2.7 %

A weight becomes a parametrization of what is kept, so the model's own code sees a weight as before, in any module. The
arithmetic stays in the dtype of the activations, so this saves memory; it saves time only where reading weights is what
takes the time. Where the model was trained with casts, its plan's own constants are used, for weights and activations:

    x̂ = cast(x · s) / s,  s the plan's power of two for that matmul

On disk such a model is its config.json beside `fp8_weights.safetensors` (not a name that transformers would load, as it
would take the numbers without their scales):

    <name>              ŵ in float8_e4m3fn, or a tensor that is kept as it is
    <name>_scale        2^-k: ŵ times this is the weight
    <module>.input_scale    1/s: x̂ · s times this is the input; the dtype of the cast is in the file's metadata
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from lightning_unitscale.engine.plan.fold import folded_copy
from lightning_unitscale.engine.plan.plan import Plan, plan_of
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.keys import ParameterKey
from lightning_unitscale.engine.record.tensor_facts import rms
from lightning_unitscale.errors import InputError, UnitScalingError
from lightning_unitscale.formats import FORMATS, cast, exponent

WEIGHT_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
FP8_FILE = "fp8_weights.safetensors"

Casts = dict[str, tuple[torch.dtype, float]]  # by module: what its input is cast to, and the scale before it


class _Kept(nn.Module):
    """From the kept weight to the one that is used."""

    scale: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype, scale: float | None) -> None:
        super().__init__()
        self.dtype, self.used = dtype, weight.dtype
        if scale is None:
            k = exponent(rms(weight), float(weight.detach().abs().max()), dtype) if dtype.itemsize == 1 else 0
            scale = 2.0**k
        self.register_buffer("scale", torch.tensor(scale, dtype=weight.dtype, device=weight.device))

    def forward(self, kept: Tensor) -> Tensor:
        return kept.to(self.used) / self.scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:  # a tuple, as one bare tensor may not change its dtype
        return (cast(weight, self.dtype, self.scale),)


class _RoundedInput:
    """A module's pre-hook: its input cast as in training."""

    def __init__(self, dtype: torch.dtype, scale: float) -> None:
        self.dtype, self.scale = dtype, scale

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = args
        return (cast(x, self.dtype, self.scale).to(x.dtype) / self.scale if x.is_floating_point() else x, *others)


# ----------------------------------------------------------------------------------------------------------------------
# In memory


def quantize_weights(model: nn.Module, format: str, plan: Plan | None = None) -> None:
    """Keep every weight of at least two dimensions in another format, in place; for inference alone.

    Args:
        model: plain (`to_plain`): factors in the forward pass would not find weights that are made on access.
        format: "bfloat16" or "fp8".
        plan: of the model before it was made plain; its casts of activations stay.

    Raises:
        InputError: there is no such format.
        UnitScalingError: the model is not plain.
    """
    if plan_of(model) is not None:
        raise UnitScalingError(f"{type(model).__name__} is unit-scaled; pass what to_plain() returns.")
    if format not in WEIGHT_FORMATS:
        raise InputError(f"weights={format} is not known; choose one of {', '.join(WEIGHT_FORMATS)}")
    dtype = WEIGHT_FORMATS[format]
    sites = _plain_cast_sites(plan) if plan is not None else []
    same_weights = plan is not None and plan.storage == "folded"
    scales: dict[str, float] = {
        site.params[0]: site.operand_scales["weight"]
        for site in sites
        if same_weights and FORMATS[str(site.format)].weight == dtype
    }
    inputs = {
        site.params[0].rpartition(".")[0]: (FORMATS[str(site.format)].dtypes[0], site.operand_scales["x"])
        for site in sites
    }
    modules = dict(model.named_modules())
    _quantize(model, dtype, scales, {name: cast for name, cast in inputs.items() if name in modules})


def _plain_cast_sites(plan: Plan) -> list[Site]:
    """The measured casts of matmuls with one weight, whose input is the same in the plain model."""
    moved = {site.name for site in folded_copy(plan).explicit_sites}  # a tied readout's factor moves into its input
    return [
        site
        for site in plan.cast_sites
        if site.name not in moved
        and len(site.params) == 1
        and not FORMATS[str(site.format)].has_blocks
        and not site.row_exponents
        and not _is_made(site.params[0])
        and {"x", "weight"} <= site.operand_scales.keys()
    ]


def _quantize(model: nn.Module, dtype: torch.dtype, scales: Mapping[str, float], casts: Casts) -> None:
    """Quantize the weights, with these scales where there are any (by name), and cast the inputs of these modules."""
    uses: dict[nn.Parameter, list[tuple[nn.Module, str, str]]] = defaultdict(list)
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if parameter.dim() >= 2 and parameter.dtype != dtype and not _is_made(full):
                uses[parameter].append((module, name, full))
    for parameter, owners in uses.items():
        parameter.requires_grad_(False)
        known = next((scales[full] for _, _, full in owners if full in scales), None)
        kept = _Kept(parameter, dtype, known)
        for module, name, _ in owners:
            parametrize.register_parametrization(module, name, kept, unsafe=True)
        lists: list[Any] = [module.get_submodule(f"parametrizations.{name}") for module, name, _ in owners]
        for other in lists[1:]:  # tied weights stay one tensor
            other.original0 = lists[0].original0
    for name, (target, scale) in casts.items():
        model.get_submodule(name).register_forward_pre_hook(_RoundedInput(target, scale))


def _is_made(key: str) -> bool:
    """Whether a parameter only goes into making a weight (weight norm), or weights are made of it together."""
    names = ParameterKey(key).names
    return len(names) > 1 or "parametrizations" in names[0].split(".")


def stored_bytes(model: nn.Module) -> int:
    """Size of all parameters, tied ones once, and of the scales of narrow ones."""
    scales = {id(m): m.scale for m in model.modules() if isinstance(m, _Kept)}
    return sum(tensor.nbytes for tensor in (*model.parameters(), *scales.values()))


# ----------------------------------------------------------------------------------------------------------------------
# On disk


def save_fp8(model: PreTrainedModel, folder: Path) -> None:
    """Write a model whose weights are kept in fp8, with its config; see above.

    Args:
        model: after `quantize_weights(model, "fp8")`.
        folder: made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    state: dict[str, Tensor] = model.state_dict()
    metadata = {"format": "pt"}
    for prefix, module in model.named_modules():
        if parametrize.is_parametrized(module):
            lists: Any = module.parametrizations
            for name in [name for name in lists if isinstance(lists[name][0], _Kept)]:
                where, full = f"{prefix}.parametrizations.{name}", f"{prefix}.{name}"
                state[full.lstrip(".")] = state.pop(f"{where}.original0".lstrip("."))
                state[f"{full}_scale".lstrip(".")] = 1 / state.pop(f"{where}.0.scale".lstrip("."))
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _RoundedInput):
                state[f"{prefix}.input_scale"] = torch.tensor(1 / hook.scale)
                metadata[prefix] = str(hook.dtype).removeprefix("torch.")
    first = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}
    tied = {name for name, tensor in state.items() if first[tensor.data_ptr()] != name}
    tensors = {n: t.contiguous() for n, t in state.items() if n not in tied and n.removesuffix("_scale") not in tied}
    save_file(tensors, folder / FP8_FILE, metadata)


def load_fp8(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the weights of `save_fp8`, kept as they are on disk.

    Args:
        model: plain, as its config builds it.
        folder: that `save_fp8` wrote.

    Raises:
        InputError: the file cannot be read, or is of another model.
    """
    try:
        with safe_open(folder / FP8_FILE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
            metadata = file.metadata()
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / FP8_FILE} cannot be read: {error}") from error
    inverse = {name: float(tensors.pop(f"{name}_scale")) for name in list(tensors) if f"{name}_scale" in tensors}
    casts = {
        module: (getattr(torch, dtype), 1 / float(tensors.pop(f"{module}.input_scale")))
        for module, dtype in metadata.items()
        if f"{module}.input_scale" in tensors
    }
    places = model.state_dict()
    stored = {places[name].data_ptr() for name in tensors if name in places}  # tied ones stand under one name
    wrong = [name for name in tensors if name not in places or tensors[name].shape != places[name].shape]
    wrong += [name for name, place in places.items() if place.data_ptr() not in stored]
    if wrong:
        raise InputError(f"{folder / FP8_FILE} is not of a {type(model).__name__} with this config.json: {wrong[0]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor.to(places[name].dtype) * inverse.get(name, 1.0))
    _quantize(model, WEIGHT_FORMATS["fp8"], {name: 1 / scale for name, scale in inverse.items()}, casts)
