"""What the numbers in a tensor are like; of one that is spread over processes, what those of the whole are like."""

from __future__ import annotations

from math import inf

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_unitscale.engine.record.spread_tensors import over_parts, part_of, whole
from lightning_unitscale.engine.record.trace import ParameterFacts


def parameter_facts(module: nn.Module) -> dict[str, ParameterFacts]:
    """What each parameter is like now, by its first name."""
    names: dict[int, list[str]] = {}
    parameters: dict[int, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    return {
        first: ParameterFacts(
            shape=tuple(parameters[key].shape),
            rms=rms(parameters[key]),
            trainable=parameters[key].requires_grad,
            is_constant=is_constant(parameters[key]),
            largest=largest(parameters[key]),
            is_set=is_set(parameters[key]),
            aliases=tuple(aliases),
        )
        for key, (first, *aliases) in names.items()
    }


def rms(tensor: Tensor) -> float:
    """Root mean square of a tensor's elements; 0 of none, of other than floating point, or of what can't be read."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not is_readable(tensor):
        return 0.0
    with torch.no_grad():
        norm = torch.linalg.vector_norm(part_of(tensor), dtype=_wide(tensor))
        if isinstance(tensor, DTensor):
            norm = over_parts(norm.square(), tensor).sqrt()
        return float(norm / tensor.numel() ** 0.5)


def largest(tensor: Tensor) -> float:
    """The largest magnitude of a tensor's elements; 0 as for `rms`."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not is_readable(tensor):
        return 0.0
    part = part_of(tensor.detach())
    if part.is_complex():
        part = part.abs()
    found = torch.maximum(part.amax(), -part.amin()) if part.numel() else part.new_zeros(())
    return float(over_parts(found, tensor, dist.ReduceOp.MAX))


def is_readable(tensor: Tensor) -> bool:
    """Whether a tensor has elements, and memory with their values: not on meta, nor inside vmap or the like."""
    return tensor.numel() > 0 and not tensor.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _wide(tensor: Tensor) -> torch.dtype:
    if tensor.is_complex():
        return torch.complex128 if tensor.dtype == torch.complex128 else torch.complex64
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def is_alias(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same memory."""
    return (
        one.shape == other.shape
        and one.stride() == other.stride()
        and one.device == other.device
        and is_readable(one)
        and is_readable(other)
        and one.data_ptr() == other.data_ptr() != 0
    )


def is_constant(tensor: Tensor) -> bool:
    """Whether all its elements are equal."""
    if not is_readable(tensor):
        return False
    if isinstance(tensor, DTensor):
        part = part_of(tensor.detach())
        ends = [part.amax(), -part.amin()] if part.numel() else [part.new_tensor(-inf)] * 2
        highest, lowest = over_parts(torch.stack(ends), tensor, dist.ReduceOp.MAX).tolist()
        return bool(highest == -lowest)
    flat = tensor.detach().reshape(-1)
    return bool(flat[0] == flat[-1]) and bool((flat == flat[0]).all())  # at once, of what was drawn at random


def is_set(tensor: Tensor) -> bool:
    """Whether a vector is no draw about zero: a tenth of it is one number, or its mean is five standard errors off.

    An LSTM's bias with ones for the forget gate alone; logarithms of time steps. What is zero in part is a draw still.
    """
    if tensor.dim() != 1 or not tensor.is_floating_point() or not is_readable(tensor):
        return False
    values = whole(tensor.detach()).double()
    numbers, counts = values[values != 0].unique(return_counts=True)
    if numbers.numel() and int(counts.max()) >= max(3, 0.1 * values.numel()):
        return True
    return bool(values.mean().abs() > 5 * values.square().mean().sqrt() / values.numel() ** 0.5)


def number(tensor: Tensor) -> float | None:
    """Its only element; None if it has more, or none that can be read."""
    if tensor.numel() != 1 or tensor.is_complex() or not is_readable(tensor):
        return None
    return float(whole(tensor.detach()))
