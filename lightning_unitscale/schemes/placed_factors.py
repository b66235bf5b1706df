"""The factors of a plan in the making: what stands so far on the uses of weights, and what on parameter-free places."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_unitscale.engine.analysis.roles import Use
from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.engine.record.trace import Call
from lightning_unitscale.schemes.draft import Draft
from lightning_unitscale.schemes.free_sites import FreeSites
from lightning_unitscale.schemes.pushing import CallUse, Push

MODEL = "the model's own code, absorbed"  # the source of a factor that takes one of its constants out


class PlacedFactors:
    """What each part of the planner adds its factors to.

    Attributes:
        at_uses: by call and weight; those of one use are averaged over its calls in the end.
        free: the parameter-free sites.
        notes: what the reader of the plan should know of places that were left alone.
    """

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.at_uses: dict[CallUse, list[Factor]] = {}
        self.free = FreeSites(draft)
        self.notes: list[str] = []

    def put(self, uses: Iterable[CallUse], factors: Sequence[Factor]) -> None:
        """Multiply weights, in these calls of theirs."""
        for use in uses:
            self.at_uses[use] = [*self.at_uses.get(use, []), *factors]

    def push(self, found: Iterable[Push], factors: Sequence[Factor]) -> None:
        """Multiply the weights at all the sources of a tensor."""
        for push in found:
            self.put(push.uses, factors)

    def leave_alone(self, what: str, call: Call, reason: str) -> None:
        """Say that a place has no factor, and why."""
        where = f"at {call.frame}" if call.frame else f"({call.name})"
        self.notes.append(f"the {what} {where} was left alone: {reason}")

    def uses_of(self, key: str) -> list[Use]:
        """Every use of a weight."""
        return [use for use in self.draft.uses.values() if use.key == key]

    def are_all_calls(self, uses: Iterable[CallUse]) -> bool:
        """Whether there are uses, and their weights are called nowhere else: a factor on them acts here alone."""
        found = set(uses)
        calls = {(call.index, key) for _, key in found for use in self.uses_of(key) for call in use.calls}
        return bool(found) and calls == found
