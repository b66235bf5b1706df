"""The explicit factors and casts of one plan, as all its scopes share them."""

from __future__ import annotations

from typing import Any

from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.engine.record.places import Place
from lightning_unitscale.engine.runtime.casts import CastSite
from lightning_unitscale.engine.runtime.compilation import show_to_modes
from lightning_unitscale.engine.runtime.made_of import made_of_by_key
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.ops import functions_named
from lightning_unitscale.ops.torch_functions import is_in_place

MULTI_HEAD = "multi_head_attention_forward"  # is opened, so that the calls inside are seen


class Rules:
    """What is to be done to which torch calls.

    Attributes:
        made_of: the weights with uses that have a factor or are cast, by key.
        casts: the uses whose operands are cast, those of products without a weight too.
        followed: names of the functions through which parameters are followed.
        free: names of the functions with parameter-free sites.
        ops: names of the functions that use weights with a factor, or are cast.
        watched: the names of all these functions of torch.
        in_place: those that write to their first argument.
        applied: what was applied, while somebody asks; None otherwise.
    """

    def __init__(
        self,
        factors: dict[UseId, float],
        readings: set[UseId],
        casts: dict[UseId, CastSite],
        followed: list[str],
        free: list[str],
    ) -> None:
        self.applied: AppliedFactors | None = None
        self.made_of = made_of_by_key(factors, readings, casts)
        self.casts, self.followed, self.free = casts, frozenset(followed), frozenset(free)
        self.ops = frozenset(op for _, op in (*factors, *casts))
        self._find_functions()

    def _find_functions(self) -> None:
        names = self.followed | self.free | self.ops | {MULTI_HEAD}
        known = {name: functions_named(name) for name in names}
        unknown = sorted(name for name, functions in known.items() if not functions)
        if unknown:
            raise UnitScalingError(f"no torch function is called {', '.join(unknown)}: torch is another version?")
        self.watched: dict[Any, str] = {function: name for name, functions in known.items() for function in functions}
        self.in_place = frozenset(function for function in self.watched if is_in_place(function))
        show_to_modes(self.watched)

    def __getstate__(self) -> dict[str, Any]:
        # Torch's own functions are found anew where the rules are unpickled: not all of them can be pickled.
        return {name: value for name, value in self.__dict__.items() if name not in ("watched", "in_place")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._find_functions()


class AppliedFactors(set[UseId | Place]):
    """The uses, and the places of parameter-free sites, whose factor was applied.

    Copies of the rules share it: a rehearsal runs on copies of all that modules hold.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> AppliedFactors:
        return self
