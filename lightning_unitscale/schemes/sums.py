"""Sums of independent tensors (embeddings, projection shortcuts): a factor on each term, in the weights behind it."""

from __future__ import annotations

from collections.abc import Collection

from lightning_unitscale.engine.analysis.structure import Sum
from lightning_unitscale.engine.record.trace import Value
from lightning_unitscale.schemes.draft import Draft
from lightning_unitscale.schemes.free_sites import parameter_free_site
from lightning_unitscale.schemes.left_alone import no_place
from lightning_unitscale.schemes.local import LocalSchemes
from lightning_unitscale.schemes.placed_factors import PlacedFactors
from lightning_unitscale.schemes.pushing import pushes


def place_sums(placed: PlacedFactors, rules: LocalSchemes, zeros: Collection[str]) -> None:
    """Put the scheme's factor on the terms of each sum that no norm follows.

    Args:
        zeros: weights that start at zero; a term made of these alone adds nothing yet.
    """
    for addition in placed.draft.structure.sums:
        if not placed.draft.structure.goes_only_into_norms(addition.call.output):
            _place(placed, rules, addition, zeros)


def _place(placed: PlacedFactors, rules: LocalSchemes, addition: Sum, zeros: Collection[str]) -> None:
    draft = placed.draft
    terms = sum(not _is_zero(draft, term, zeros) for term in addition.terms)
    factors = rules.ask_at(addition.call, lambda scheme: scheme.sum(terms)) if terms > 1 else []
    if not factors:
        return
    parts = set().union(*(draft.structure.parts(term) for term in addition.terms))
    for reason in [why for name, why in draft.readings.left_alone.items() if name in parts][:1]:
        placed.leave_alone("sum", addition.call, reason)
        return
    found = [pushes(draft, term, set(addition.chain)) for term in addition.terms]
    if all(found):
        for sources in found:
            placed.push(sources, factors)
    elif reason := no_place(addition.call):
        placed.leave_alone("sum", addition.call, reason)
    else:
        site = parameter_free_site(addition.call, "sum", factors)
        site.reason = "a term is used elsewhere too, or is left alone"
        placed.free.add(site)


def _is_zero(draft: Draft, term: Value, zeros: Collection[str]) -> bool:
    """Whether a term is zero at the start: all its weights are."""
    names = [
        name
        for source in draft.structure.sources(term)[0]
        for value in (source.value, *(source.value.producer.inputs if source.value.producer else ()))
        for name in value.parameters
    ]
    return bool(names) and all(draft.trace.facts[name].rms == 0 or name in zeros for name in names)
