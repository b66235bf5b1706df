"""The tensors of a torch call: those that it is given, makes and writes to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lightning_unitscale.ops import FunctionCall, is_lookup
from lightning_unitscale.ops.torch_functions import PASSTHROUGH, RETURN_NOTHING, is_in_place


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)


def tensors_made(op: str, args: tuple[Any, ...], result: Any) -> list[Tensor]:
    """The tensors that a call returned, or wrote to if it returns nothing."""
    return list(tensors_in(args[0] if result is None and op in RETURN_NOTHING else result))


def written_to(op: str, call: FunctionCall) -> Iterator[Tensor]:
    """The tensors whose elements a call changes; a lookup with `max_norm` does so to rows of its table."""
    if op in RETURN_NOTHING or (is_in_place(call.function) and op not in PASSTHROUGH):
        yield from tensors_in(call.args[:1])
    elif is_lookup(op) and call.argument(3, "max_norm") is not None:
        yield from tensors_in(call.args[1:2])


def has_ordinal(args: tuple[Any, ...]) -> bool:
    """Whether a call counts among the calls of its function in a frame: those on indices and masks do not."""
    first = next(tensors_in(args), None)
    return first is not None and (first.is_floating_point() or first.is_complex())
