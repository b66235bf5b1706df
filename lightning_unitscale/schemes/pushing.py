"""Push a factor of an activation back to the weights that make it.

A constant passes linear calls (views, casts, sums, rotations) unchanged, so a factor wanted on a tensor can as well
stand on every weight that the tensor comes from, if nothing else uses what lies between.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from lightning_unitscale.engine.analysis.graph import Source
from lightning_unitscale.engine.record.keys import ParameterKey
from lightning_unitscale.engine.record.trace import Value
from lightning_unitscale.ops import is_lookup
from lightning_unitscale.schemes.draft import Draft

CallUse = tuple[int, ParameterKey]  # index of a call, and the key of a parameter that it uses


@dataclass(frozen=True)
class Push:
    """One source of a tensor, and the uses there that can take a factor."""

    source: Source
    uses: list[CallUse]

    @property
    def model_constant(self) -> float:
        """What the model itself multiplies by between the source and the tensor; a lookup's own is absorbed already."""
        producer = self.source.value.producer
        absorbed = producer is not None and is_lookup(producer.name)
        return 1.0 if absorbed else self.source.model_constant


def pushes(draft: Draft, value: Value, end: Collection[int]) -> list[Push]:
    """Where a factor of `value`, used by the calls `end` alone, can be pushed to; empty if it can't."""
    sources, passed = draft.structure.sources(value)
    found = []
    for source in sources:
        uses = _uses_at(draft, source.value, {*passed, *end})
        if not uses or any(draft.is_left_alone(key) for _, key in uses):
            return []
        if not source.value.parameters and not draft.structure.only_feeds(source.value, passed, set(end)):
            return []
        found.append(Push(source, uses))
    return found


def _uses_at(draft: Draft, value: Value, consumers: set[int]) -> list[CallUse]:
    if value.parameters:
        return [(call.index, value.key) for call in draft.structure.consumers(value) if call.index in consumers]
    call = value.producer
    if call is None:
        return []
    uses = [(call.index, v.key) for v in dict.fromkeys(call.inputs) if v.parameters]
    if call in draft.structure.gains and call.name == "add":  # a norm's bias comes after its gain
        above = next((v for v in call.inputs if not v.parameters), None)
        uses += _uses_at(draft, above, consumers) if above is not None else []
    return uses
