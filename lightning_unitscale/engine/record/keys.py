"""Names for what is made of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple


class ParameterKey(str):
    """The name of a parameter, or of an expression of several: their names, joined.

    A plain string otherwise, so that `name in site.params` and JSON work.
    """

    __slots__ = ()

    @classmethod
    def of(cls, names: Iterable[str]) -> ParameterKey:
        """The key of what is made of these parameters."""
        return cls("+".join(sorted(set(names))))

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in order; none for the empty key."""
        return tuple(self.split("+")) if self else ()

    def renamed(self, rename: Callable[[str], str]) -> ParameterKey:
        """The key with each parameter called by its new name."""
        return ParameterKey.of(map(rename, self.names))


class UseId(NamedTuple):
    """What factors and casts are found by while a model runs.

    Attributes:
        key: of the parameters used, or, for a product without any, its place in the code as text.
        op: short name of the torch function that uses them.
    """

    key: str
    op: str
