"""The explicit factors and casts of one plan, as all its scopes share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.engine.record.places import Place
from lightning_unitscale.engine.runtime.casts import CastSite
from lightning_unitscale.engine.runtime.compilation import show_to_modes
from lightning_unitscale.engine.runtime.made_of import made_of_by_key
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.ops import functions_named
from lightning_unitscale.ops.torch_functions import is_in_place

MULTI_HEAD = "multi_head_attention_forward"  # is opened, so that the calls inside are seen


class WatchedFunction(NamedTuple):
    """A function of torch, by its short name, and whether it writes to its first argument."""

    name: str
    in_place: bool


# All that some rules are about. A global: in a dict that hangs on an entered mode the compiler can't look up functions
# that are written in Python (`Tensor.norm`), as it finds no hash of them.
WATCHED: dict[Any, WatchedFunction] = {}


class Rules:
    """What is to be done to which torch calls.

    Attributes:
        made_of: the weights with uses that have a factor or are cast, by key.
        casts: the uses whose operands are cast, those of products without a weight too.
        followed: names of the functions through which parameters are followed.
        ways: in which ways any of them is, see `engine.record.keys.way_of`; a name alone is any way.
        free: names of the functions with parameter-free sites.
        ops: names of the functions that use weights with a factor, or are cast.
        names: of all these functions.
        applied: what was applied, while somebody asks; None otherwise.
    """

    def __init__(
        self,
        factors: dict[UseId, float],
        readings: set[UseId],
        casts: dict[UseId, CastSite],
        followed: list[str],
        followed_with_others: Mapping[str, list[str]],
        free: list[str],
    ) -> None:
        self.applied: AppliedFactors | None = None
        self.made_of = made_of_by_key(factors, readings, casts, followed_with_others)
        self.casts, self.free, self.ways = casts, frozenset(free), frozenset(followed)
        with_others = (way for made_of in self.made_of.values() for way in made_of.ways)
        self.followed = frozenset(way.partition(":")[0] for way in (*followed, *with_others))
        self.ops = frozenset(op for _, op in (*factors, *casts))
        self.names = self.followed | self.free | self.ops | {MULTI_HEAD}
        self._find_functions()

    def _find_functions(self) -> None:
        known = {name: functions_named(name) for name in self.names}
        unknown = sorted(name for name, functions in known.items() if not functions)
        if unknown:
            raise UnitScalingError(f"no torch function is called {', '.join(unknown)}: torch is another version?")
        for name, functions in known.items():
            show_to_modes(functions)
            WATCHED.update((function, WatchedFunction(name, is_in_place(function))) for function in functions)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._find_functions()


class AppliedFactors(set[UseId | Place]):
    """The uses, and the places of parameter-free sites, whose factor was applied.

    Copies of the rules share it: a rehearsal runs on copies of all that modules hold.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> AppliedFactors:
        return self
