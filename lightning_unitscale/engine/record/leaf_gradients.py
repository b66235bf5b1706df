"""Gradients of the leaves of a graph, as `backward` would leave them, past the hooks on parameters.

A rehearsed step must not reach those: DDP's reduction is one, an optimizer that steps in the backward pass another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def leaves_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a graph was made of and that take a gradient, each once."""
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen, found = set(pending), {}
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
        new = {above for above, _ in node.next_functions if above is not None} - seen
        seen |= new
        pending.extend(new)
    return list(found.values())


def add_gradients(tensors: Sequence[Tensor], of: Sequence[Tensor | None] | None, leaves: Sequence[Tensor]) -> None:
    """Add to the `.grad` of the leaves what the tensors give, each times its own gradient (1 where it is None)."""
    if not leaves:
        return
    known = [None] * len(tensors) if of is None else of
    seeds = [torch.ones_like(t) if g is None else g for t, g in zip(tensors, known, strict=True)]
    found = torch.autograd.grad(tensors, leaves, seeds, retain_graph=True, allow_unused=True)
    with torch.no_grad():
        for leaf, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
