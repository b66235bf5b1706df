"""Attention logits: the scheme's factor in place of the model's own constant, in the weights of query or key."""

from __future__ import annotations

from math import isclose

from lightning_unitscale.engine.analysis.attention import Attention
from lightning_unitscale.engine.plan.factors import Factor, inverse
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.schemes.draft import Draft
from lightning_unitscale.schemes.free_sites import parameter_free_site
from lightning_unitscale.schemes.left_alone import no_place
from lightning_unitscale.schemes.local import LocalSchemes
from lightning_unitscale.schemes.placed_factors import MODEL, PlacedFactors
from lightning_unitscale.schemes.pushing import pushes

OWN_CONSTANT = "the model's own constant is the scheme's"


class LogitFactors:
    """What a scheme multiplies attention logits by."""

    def __init__(self, draft: Draft, rules: LocalSchemes) -> None:
        self.draft, self.rules = draft, rules

    def place(self, placed: PlacedFactors) -> None:
        """Put it on each product of queries and keys."""
        for attention in self.draft.structure.attentions:
            factors = self._factors(attention)
            if factors is not None:
                self._place(placed, attention, factors)

    def _place(self, placed: PlacedFactors, attention: Attention, factors: list[Factor]) -> None:
        call = attention.call
        sides = (pushes(self.draft, side, {call.index}) for side in (attention.query, attention.key))
        found = next(filter(None, sides), [])
        into = [use for push in found for use in push.uses]
        site = self.site(attention)
        if site is None and call.in_function and placed.are_all_calls(into):
            placed.push(found, factors)
        elif site is None:
            placed.leave_alone("attention", call, no_place(call))
        else:
            calls = self.draft.trace.calls
            site.fold_into = [UseId(key, calls[index].name) for index, key in into]
            if not (into or site.reason):
                site.reason = "query and key come out of one weight, or are shared"
            placed.free.add(site, (calls[index] for index, _ in into))

    def _factors(self, attention: Attention) -> list[Factor] | None:
        rule = self.rules.ask_at(attention.call, lambda scheme: scheme.attention(attention.head_dim))
        if rule is None:
            return None
        return [*rule, *inverse(attention.model_constant, "its constant on the logits", MODEL)]

    def site(self, attention: Attention) -> Site | None:
        """Where the factor stands; None where it has no place, or the scheme no rule for it."""
        factors = self._factors(attention)
        if factors is None or no_place(attention.call):
            return None
        site = parameter_free_site(attention.call, "attention", factors, attention.query)
        site.last_dim = attention.head_dim if attention.query.shape[-1] == attention.head_dim else None
        if isclose(site.multiplier, 1.0, rel_tol=1e-9):  # a rounding apart would keep a factor in the forward pass
            site.leave_alone(OWN_CONSTANT)
        return site
