"""What a tensor is known as while a model runs: made of which parameters, and what is to be done where it is used.

Compiled code tells tensors apart by these objects alone, and never reads a name. Names differ from block to block, so
that code which depended on them would be compiled anew for each of a hundred equal blocks; objects that say the same
are the same to the compiler.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lightning_unitscale.engine.record.keys import ParameterKey, UseId
from lightning_unitscale.engine.runtime.block_constants import BlockConstant, block_constants
from lightning_unitscale.engine.runtime.casts import CastSite, WeightCast


class MadeOf:
    """A parameter, or an expression of several.

    Args:
        name: of the parameter; none for an expression.
        parts: the parameters of an expression.

    Attributes:
        factors: explicit ones, by the short name of the function that uses it.
        constants: those of the factors that differ between blocks, for compiled code.
        casts: the same, of uses whose operands are cast.
        readings: functions by which code reads it; what they make of it is no weight any more.
        ways: in which it makes a weight together with tensors that are none, see `engine.record.keys.way_of`.
        joins: the expressions that it is a part of and that have uses of their own.
    """

    def __init__(self, name: str = "", parts: tuple[MadeOf, ...] = ()) -> None:
        self.name, self._parts = name, parts
        self.factors: dict[str, float] = {}
        self.constants: dict[str, BlockConstant] = {}
        self.casts: dict[str, WeightCast] = {}
        self.readings: list[str] = []
        self.ways: list[str] = []
        self.joins: list[MadeOf] = []

    @property
    def parts(self) -> tuple[MadeOf, ...]:
        """The parameters that it is made of."""
        return self._parts or (self,)

    @property
    def key(self) -> str:
        """What a plan calls it."""
        return ParameterKey.joined(part.name for part in self.parts)

    @staticmethod
    def all_of(several: Sequence[MadeOf]) -> MadeOf:
        """What is made of all of these."""
        parts: list[MadeOf] = []
        for one in several:
            parts += [part for part in one.parts if not _is_among(part, parts)]
        if len(parts) == 1:
            return parts[0]
        for known in parts[0].joins:
            if len(known.parts) == len(parts) and all([_is_among(part, parts) for part in known.parts]):  # noqa: C419
                return known
        return MadeOf(parts=tuple(parts))


def _is_among(one: MadeOf, several: Sequence[MadeOf]) -> bool:
    return any([one is other for other in several])  # noqa: C419 - the compiler can't follow a generator here


def made_of_by_key(
    factors: Mapping[UseId, float],
    readings: Iterable[UseId],
    casts: Mapping[UseId, CastSite],
    ways: Mapping[str, Sequence[str]],
) -> dict[str, MadeOf]:
    """All that has uses with a factor or casts, and the parameters that it is made of, by key.

    Args:
        ways: of each key, that in `MadeOf.ways`; those of other parameters too.
    """
    of_weights = {use: cast for use, cast in casts.items() if isinstance(cast, WeightCast)}
    found: dict[str, MadeOf] = {}
    keys = {use.key for use in (*factors, *readings, *of_weights)}
    known = {name for key in keys for name in ParameterKey.names_in(key)}
    keys |= {key for key in ways if known.issuperset(ParameterKey.names_in(key))}
    for key in sorted(keys):
        names = ParameterKey.names_in(key)
        parts = tuple(found.setdefault(name, MadeOf(name)) for name in names)
        if len(parts) > 1:
            found[key] = MadeOf(parts=parts)
            for part in parts:
                part.joins.append(found[key])
        found[key].ways += ways.get(key, ())
    for use, factor in factors.items():
        found[use.key].factors[use.op] = factor
    for use, constant in block_constants(factors, {use: f"{use.key}:{use.op}" for use in factors}).items():
        found[use.key].constants[use.op] = constant
    for use in readings:
        found[use.key].readings.append(use.op)
    for use, cast in of_weights.items():
        found[use.key].casts[use.op] = cast
    return found
