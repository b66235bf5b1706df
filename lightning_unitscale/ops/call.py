"""A call of a torch function as one object: what planning, recording and running ask the same questions of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


class FunctionCall:
    """A torch function and what it is called with.

    Args:
        function: as `__torch_function__` receives it.
        args, kwargs: tensors while a model runs; in a recorded call the values that stand for them.
    """

    __slots__ = ("args", "function", "kwargs")

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at `position`, or by `name`."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def with_each(self, new: Callable[[Any], Any]) -> FunctionCall:
        """The same call with `new(argument)` in place of each argument, in lists too."""

        def replaced(argument: Any) -> Any:
            if isinstance(argument, (list, tuple)) and not isinstance(argument, torch.Size):
                return type(argument)([replaced(item) for item in argument])
            return new(argument)

        kwargs = {name: replaced(argument) for name, argument in self.kwargs.items()}
        return FunctionCall(self.function, tuple(replaced(argument) for argument in self.args), kwargs)

    def run(self) -> Any:
        """The function's result."""
        return self.function(*self.args, **self.kwargs)
