"""Forward and backward of one module: their time, the memory that they need, and what autograd keeps between them."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

MIB = 2**20


class ForwardBackward:
    """A step without its optimizer.

    Args:
        module: or what `torch.compile` made of one.
        x: its input.
    """

    def __init__(self, module: Any, x: Tensor) -> None:
        self.module, self.x = module, x
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.gradient: Tensor | None = None
        self.on_gpu = x.is_cuda

    def milliseconds(self) -> float:
        """Of one step; the weights are written before it, outside the clock."""
        self.write_weights()
        if not self.on_gpu:
            begin = time.perf_counter()
            self.run()
            return 1e3 * (time.perf_counter() - begin)
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.x.device)
        begin_event.record()
        self.run()
        end_event.record()
        torch.cuda.synchronize(self.x.device)
        elapsed: float = begin_event.elapsed_time(end_event)
        return elapsed

    def write_weights(self) -> None:
        """As an optimizer does, but with the values that they have."""
        with torch.no_grad():
            torch._foreach_mul_(self.parameters, 1.0)

    def run(self) -> None:
        """Forward and backward; gradients are thrown away."""
        y = self.module(self.x)
        if self.gradient is None:
            self.gradient = torch.randn_like(y) / y.numel() ** 0.5
        y.backward(self.gradient)
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None

    def peak(self, before: int) -> float | None:
        """MiB that one step needs; None on a CPU.

        Args:
            before: bytes that were allocated before this module was built.
        """
        if not self.on_gpu:
            return None
        self.write_weights()
        torch.cuda.synchronize(self.x.device)
        torch.cuda.reset_peak_memory_stats(self.x.device)
        self.run()
        torch.cuda.synchronize(self.x.device)
        assert self.gradient is not None
        standing = [*self.module.parameters(), *self.module.buffers(), self.x, self.gradient]
        own: int = sum(tensor.untyped_storage().nbytes() for tensor in standing)
        peak: int = torch.cuda.max_memory_allocated(self.x.device) - before - own
        return peak / MIB

    def saved(self) -> float:
        """MiB that the forward pass keeps for the backward pass, each storage once."""
        kept: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            self.module(self.x)
        return sum(kept.values()) / MIB
