"""Tensors that are spread over processes, seen through: the plan of a sharded or split model is that of the whole.

    FSDP2 (`fully_shard`)      between steps a parameter is a DTensor; while its module runs, a plain tensor gathered
                               from all processes stands in its place (`gathering_modules` says where)
    tensor parallelism         weights and activations are DTensors all along, with the shape of the whole; what makes
    (`parallelize_module`)     them of plain tensors, and plain tensors of them, moves numbers, changing none (`MOVES`)
    FSDP1                      not seen through: a plan is made before (`before_wrapping`), and finds by name what the
                               optimizer has, pieces of flat pieces (`plain_name`)

What is read of such a tensor, its RMS say, is the whole's: reduced over the processes that hold its parts, all of which
must ask for it. No process ever holds more than its part for that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

MOVES = frozenset({"_FromTorchTensor", "_ToTorchTensor", "Redistribute"})  # autograd.Functions of DTensor


def part_of(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in this process, in the same memory where it is a part or a copy of the whole."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return settled(tensor).to_local()


def settled(tensor: DTensor) -> DTensor:
    """A tensor of which each process holds a summand, summed up; any other itself."""
    from torch.distributed.tensor import Replicate

    if not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    return tensor.redistribute(
        placements=[Replicate() if placement.is_partial() else placement for placement in tensor.placements]
    )


def over_parts(number: Tensor, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """What each process computed of its part of `tensor`, reduced to what holds for the whole."""
    if isinstance(tensor, DTensor):
        number = number.clone()
        for dim, placement in enumerate(tensor.placements):
            if not (placement.is_replicate() or placement.is_partial()):
                dist.all_reduce(number, op, group=tensor.device_mesh.get_group(dim))
    return number


def whole(tensor: Tensor) -> Tensor:
    """All of a small tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_name(name: str) -> str:
    """The name of a parameter or module before FSDP1 wrapped what is around it."""
    return name.replace("_fsdp_wrapped_module.", "").removesuffix("._fsdp_wrapped_module")


def is_flat_piece(parameter: nn.Parameter) -> bool:
    """Whether FSDP1 has put a piece of a flat piece in the place of a parameter."""
    return getattr(parameter, "_fsdp_flattened", False)


def is_spread(parameter: nn.Parameter) -> bool:
    """Whether this process has but a part of a parameter, between steps; `ds_id` is ZeRO 3's."""
    return isinstance(parameter, DTensor) or is_flat_piece(parameter) or hasattr(parameter, "ds_id")


def number_of_elements(parameter: nn.Parameter) -> int:
    """Of the whole parameter; under FSDP1 of the piece."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 gathers parameters while parts of the module run."""
    return any(isinstance(child, FSDPModule) for child in module.modules())


def gathering_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The modules in which gathered tensors stand in the place of parameters as long as they run."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            yield child


def name_of_gathered(module: nn.Module, tensor: nn.Parameter) -> str | None:
    """Of which parameter a tensor is what was gathered; None if of none."""
    if not is_sharded(module):
        return None
    for name, child in module.named_modules():
        for attribute, known in child._parameters.items():
            if known is tensor:
                return f"{name}.{attribute}" if name else attribute
    return None
