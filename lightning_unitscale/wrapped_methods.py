"""Methods of a strategy, replaced on the instance: a wrapper around it, or another class, would break isinstance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy


class WrappedMethods:
    """Some methods of one strategy instance, ours in their place until `undo` is called.

    Args:
        before: by name, what runs before the strategy's own method: `ours(strategy, *args, **kwargs)`.
        around: by name, what runs in its place and may call it: `ours(strategy, proceed, *args, **kwargs)`.
    """

    def __init__(
        self, strategy: Strategy, before: Mapping[str, Callable[..., Any]], around: Mapping[str, Callable[..., Any]]
    ) -> None:
        self.strategy = strategy
        self._names = (*before, *around)
        for name, ours in before.items():
            setattr(strategy, name, _Before(ours, strategy, name))
        for name, ours in around.items():
            setattr(strategy, name, _Around(ours, strategy, name))

    def undo(self) -> None:
        """Give the strategy its own methods back, and what somebody else had put in their place before."""
        for name in self._names:
            method = self.strategy.__dict__.pop(name, None)
            while method is not None and not isinstance(method, _Method):  # one that was put around ours
                method = getattr(method, "__wrapped__", None)
            if method is not None and method.replaced is not None:
                setattr(self.strategy, name, method.replaced)


class _Method:
    """Stands in for a method of an instance; picklable, as a Trainer that spawns must be."""

    def __init__(self, ours: Callable[..., Any], strategy: Strategy, name: str) -> None:
        self.ours, self.strategy, self.name = ours, strategy, name
        self.replaced = strategy.__dict__.get(name)

    def proceed(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method that this one stands in for."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return getattr(type(self.strategy), self.name)(self.strategy, *args, **kwargs)


class _Before(_Method):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.ours(self.strategy, *args, **kwargs)
        return self.proceed(*args, **kwargs)


class _Around(_Method):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.ours(self.strategy, self.proceed, *args, **kwargs)
