"""A model of transformers over the processes of a `ModelParallelStrategy`: sharded by FSDP2, split, or both."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from lightning_unitscale.errors import InputError

STYLES: dict[str, Any] = {  # as transformers writes them in a model's `tp_plan`
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
}


def spread(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split the layers that the model's own plan names, and shard it layer by layer.

    Args:
        mesh: with the dimensions "data_parallel" and "tensor_parallel", as Lightning makes it.

    Raises:
        InputError: the model has no plan for tensor parallelism, or one with styles of its own.
    """
    split, data = mesh["tensor_parallel"], mesh["data_parallel"]
    if split.size() > 1:
        parallelize_module(model, split, dict(_styles(model)))
    if data.size() > 1:
        for child in model.modules():
            if isinstance(child, nn.ModuleList):
                for layer in child:
                    fully_shard(layer, mesh=data)
        fully_shard(model, mesh=data, reshard_after_forward=True)  # so that a checkpoint after validation finds shards


def _styles(model: nn.Module) -> list[tuple[str, ParallelStyle]]:
    plan: dict[str, str] = getattr(model, "tp_plan", None) or {}
    found = []
    for name, module in model.named_modules():
        style = next((style for glob, style in plan.items() if fnmatchcase(name, glob)), None)
        if style is None or not isinstance(module, nn.Linear):
            continue
        if style not in STYLES:
            raise InputError(
                f"trainer: {type(model).__name__} wants {name} split as {style!r}, which is not known here"
            )
        found.append((name, STYLES[style]()))
    if not found:
        raise InputError(
            f"trainer: {type(model).__name__} has no plan for tensor parallelism (tp_plan); take trainer=fsdp2 instead"
        )
    return found
