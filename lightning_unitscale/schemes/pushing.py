"""Push a factor of an activation back to the weights that make it.

A constant passes linear calls (views, casts, sums, rotations) unchanged, so a factor wanted on a tensor can as well
stand on every weight that the tensor comes from, if nothing else uses what lies between.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from lightning_unitscale.engine.analysis.graph import Source
from lightning_unitscale.engine.record.trace import Call, Value
from lightning_unitscale.ops import MATMULS, is_lookup
from lightning_unitscale.schemes.draft import Draft

CallUse = tuple[int, str]  # index of a call, and the key of a parameter that it uses


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


def pushes(draft: Draft, value: Value, end: Collection[int], *more: Value) -> list[Push]:
    """Where a factor of `value`, used by the calls `end` alone, can be pushed to; empty if it can't.

    Args:
        more: values with the same factor: pieces of one activation, say.
    """
    sources, passed = draft.structure.sources(value, *more)
    found = []
    for source in sources:
        uses = _uses_at(draft, source.value, {*passed, *end})
        if not uses or any(draft.is_left_alone(key) for _, key in uses):
            return []
        if not source.value.parameters and not draft.structure.only_feeds(source.value, passed, set(end)):
            return []
        found.append(Push(source, uses))
    return found


def takers(draft: Draft, call: Call, operand: Value | None = None) -> list[CallUse]:
    """The uses of a matmul-like call that together can take a constant of an operand, or of its output.

    Of several weights that multiply each other one takes it; empty if there is none, or if something without a
    parameter would have to take it too.
    """
    op = MATMULS[call.name]
    operands = op.operands(call)
    of = None if operand is None else next((label for label, v in operands.items() if v is operand), "")
    keys = [v.key for v in operands.values() if isinstance(v, Value)]
    for labels in op.takers(call, of):
        uses = [operands[label] for label in labels]
        if all(
            isinstance(v, Value) and v.parameters and not draft.is_left_alone(v.key) and keys.count(v.key) == 1
            for v in uses
        ):
            return [(call.index, v.key) for v in uses]
    return []


def _uses_at(draft: Draft, value: Value, consumers: set[int]) -> list[CallUse]:
    if value.parameters:
        calls = [call for call in draft.structure.consumers(value) if call.index in consumers]
        multiplied = [call for call in calls if call.name in MATMULS and call.inputs.count(value) > 1]
        return [] if multiplied else [(call.index, value.key) for call in calls]
    call = value.producer
    if call is None:
        return []
    if call.name in MATMULS:
        return takers(draft, call)
    made_of = draft.structure.norms[call].x if call in draft.structure.norms else None
    uses: list[CallUse] = [(call.index, v.key) for v in dict.fromkeys(call.inputs) if v.parameters and v is not made_of]
    if call in draft.structure.gains and call.name == "add":  # a norm's bias comes after its gain, if it has one
        above = next((v for v in call.inputs if not v.parameters), None)
        of_norm = _uses_at(draft, above, consumers) if above is not None else []
        return uses + of_norm if of_norm else []
    return uses
