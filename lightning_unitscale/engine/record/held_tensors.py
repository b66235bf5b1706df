"""The tensors that a model, its callbacks and what they hold keep beside the model's parameters.

Averages kept as a dict, weights saved for a rewind, a snapshot to measure a distance from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_unitscale.engine.record.deep_copies import is_shared
from lightning_unitscale.engine.record.spread_tensors import over_parts, part_of


def held_tensors(root: object, place: str, inside: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor that attributes, dicts and lists of `root` lead to, with its place as it is written in code.

    Args:
        inside: ids of objects not to be looked into; those met are added.
    """
    for where, value in _held(root, place, inside):
        if isinstance(value, Tensor):
            yield where, value


def held_mappings(root: object, place: str, inside: set[int]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """The same of mappings."""
    for where, value in _held(root, place, inside):
        if isinstance(value, Mapping):
            yield where, value


def _held(root: object, place: str, inside: set[int]) -> Iterator[tuple[str, Any]]:
    """The tensors and mappings that `root` leads to."""
    pending: list[tuple[str, Any]] = [(place, root)]
    while pending:
        place, value = pending.pop()
        if id(value) in inside:
            continue
        inside.add(id(value))
        if isinstance(value, Tensor):
            yield place, value
        elif isinstance(value, Mapping):
            yield place, value
            pending += [(f"{place}[{_key(key, position)}]", item) for position, (key, item) in enumerate(value.items())]
        elif isinstance(value, (list, tuple, set, frozenset)):
            pending += [(f"{place}[{position}]", item) for position, item in enumerate(value)]
        elif isinstance(value, nn.Module):
            pending += [(f"{place}.{name}", item) for name, item in _attributes(value)]
        elif not is_shared(value) and isinstance(getattr(value, "__dict__", None), dict):
            pending += [(f"{place}.{name}", item) for name, item in vars(value).items()]


def _key(key: object, position: int) -> str:
    return repr(key) if isinstance(key, (str, int)) else f"#{position}"


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            yield from value.items()
        elif name not in ("_trainer", "_fabric"):
            yield name, value


def is_copy(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether another tensor has the values of a parameter, bit for bit in its own dtype."""
    if tensor is parameter or tensor.shape != parameter.shape or not tensor.is_floating_point():
        return False
    if isinstance(parameter, DTensor):
        return (
            isinstance(tensor, DTensor) and tensor.placements == parameter.placements and _same_parts(tensor, parameter)
        )
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.data_ptr() == parameter.data_ptr():
        return False
    return torch.equal(tensor.detach(), parameter.detach().to(tensor))


def _same_parts(tensor: DTensor, parameter: DTensor) -> bool:
    part, other = part_of(tensor.detach()), part_of(parameter.detach())
    equal = part.data_ptr() != other.data_ptr() and torch.equal(part, other.to(part))
    return bool(over_parts(torch.tensor(float(equal), device=part.device), parameter, dist.ReduceOp.MIN))
