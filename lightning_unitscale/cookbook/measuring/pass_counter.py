"""Counts the passes over large tensors that a piece of code makes, and the bytes that they move."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

ALLOCATIONS = frozenset({"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"})


class PassCounter(TorchDispatchMode):
    """Writes down every operation on a large tensor: (its name, the bytes that it moves).

    Args:
        large: number of elements.
    """

    def __init__(self, large: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.large = large
        self.passes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(is_traceable_wrapper_subclass(leaf) for leaf in tree_leaves((args, kwargs))):
            return NotImplemented  # the tensor subclass takes it apart; we count the pieces
        result = function(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        moves = not function.is_view and function._schema.name not in ALLOCATIONS
        if moves and any(tensor.numel() >= self.large for tensor in tensors):
            self.passes.append((str(function), sum(tensor.numel() * tensor.element_size() for tensor in tensors)))
        return result

    @property
    def bytes(self) -> int:
        """Moved by all passes."""
        return sum(moved for _, moved in self.passes)
