"""Undo writes to tensors that were there before, wherever they are reached from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


class WriteGuard(TorchDispatchMode):
    """Saves the memory of each tensor that was there before, at the first write to it, and puts it back on leaving."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self._own: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def save(self, tensors: Any) -> None:
        """Save the memory of these tensors, unless it was allocated inside or is saved already."""
        for key, storage in storages(tensors):
            if key not in self._own and key not in self._before and storage.device.type != "meta":
                self._before[key] = (storage, saved(storage))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is None:  # a higher-order operator may write to anything it is given
            self.save((args, kwargs))
        elif schema.is_mutable:
            for position, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.save(args[position] if position < len(args) else kwargs.get(argument.name))
        result = func(*args, **kwargs)
        if schema is not None and not schema.is_mutable:
            new = {key for key, _ in storages(result)}
            if not new <= self._own:  # what is made of a view of something given is no memory of its own
                self._own |= new.difference(key for key, _ in storages((*args, *kwargs.values())))
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch has no types here
        for storage, before in self._before.values():
            if storage.nbytes() != before.nbytes():
                storage.resize_(before.nbytes())
            storage.copy_(before)
        self._before.clear()


_PLAIN = frozenset({Tensor, nn.Parameter})  # asked at every operation of a step


def storages(tree: Any) -> Iterator[tuple[int, torch.UntypedStorage]]:
    """The memory behind each tensor in `tree`, with the address that identifies it."""
    if isinstance(tree, Tensor):
        wrapper: Any = tree
        if type(tree) not in _PLAIN and is_traceable_wrapper_subclass(wrapper):
            names, _ = wrapper.__tensor_flatten__()
            yield from storages([getattr(wrapper, name) for name in names])
        elif tree.layout is torch.strided:
            storage = tree.untyped_storage()
            yield storage._cdata, storage
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from storages(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from storages(item)


def saved(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A copy of a storage."""
    memory: torch.UntypedStorage = torch.UntypedStorage(storage.nbytes(), device=storage.device)
    memory.copy_(storage)
    return memory
